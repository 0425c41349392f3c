"""`fleet device run | generate | doctor | selftest | enroll`."""

from fleet_cli.device.command import app

__all__ = ["app"]
