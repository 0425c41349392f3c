"""`fleet edge run | selftest | enroll`."""

from fleet_cli.edge.command import app

__all__ = ["app"]
