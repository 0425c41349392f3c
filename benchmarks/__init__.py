"""Benchmarks of what the project claims: ours and the baseline in one run."""
