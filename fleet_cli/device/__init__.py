"""`fleet device run | generate | selftest`."""

from fleet_cli.device.command import app

__all__ = ["app"]
