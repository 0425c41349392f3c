"""Hostile devices: a fleet under attack by one of its own, and what an observer can see."""
