"""Metrics and traces of an edge."""
