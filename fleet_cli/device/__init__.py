"""`fleet device run | generate | chat | doctor | selftest | forget | enroll`."""

from fleet_cli.device.command import app

__all__ = ["app"]
