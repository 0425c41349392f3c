"""What the project claims, measured: ours and the baseline in one run."""
