"""`fleet edge run | selftest`."""

from fleet_cli.edge.command import app

__all__ = ["app"]
