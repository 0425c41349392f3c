"""Dashboard: pages over the session log, for people with an account."""
