"""Metrics of an edge: what it counts while it verifies, and what it is asked about itself."""
