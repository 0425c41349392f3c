"""Dashboard: pages and a JSON API over the session log, for people with an account and programs with a key."""
