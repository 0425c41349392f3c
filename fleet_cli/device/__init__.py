"""`fleet device run | generate | chat | doctor | selftest | enroll`."""

from fleet_cli.device.command import app

__all__ = ["app"]
