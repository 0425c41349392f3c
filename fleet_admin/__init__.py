"""What an administrator runs: remote settings and commands, the dashboard, advice."""
