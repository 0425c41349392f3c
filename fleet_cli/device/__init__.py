"""`fleet device run | generate | selftest | enroll`."""

from fleet_cli.device.command import app

__all__ = ["app"]
