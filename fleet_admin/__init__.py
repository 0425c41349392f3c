"""What an administrator runs: remote settings and commands, alerts, the dashboard."""
