"""Exceptions of settings."""

from schemas.errors import FleetError

__all__ = ["SettingsError"]


class SettingsError(FleetError):
    """Settings that cannot work, or a configuration file that cannot be read. Its text has a line for each of them."""
