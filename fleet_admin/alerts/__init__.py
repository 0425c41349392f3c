"""Alerts: what is wrong with a fleet, found in its session log by rules, kept until it is over, and told."""
