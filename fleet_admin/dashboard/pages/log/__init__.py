"""Pages of what the session log holds: edges, sessions, usage, rollouts, alerts, the audit log."""
