"""Alerts: problems of a fleet, found in its session log by rules, stored until cleared, and delivered."""
