"""`fleet edge run | selftest | advise | enroll`."""

from fleet_cli.edge.command import app

__all__ = ["app"]
