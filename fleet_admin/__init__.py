"""What an administrator runs: settings and commands from afar, alerts, the dashboard."""
