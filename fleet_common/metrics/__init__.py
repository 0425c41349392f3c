"""Metrics of a running program for Prometheus: counters, their families, and the HTTP endpoint that tells them."""
