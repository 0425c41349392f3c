"""Exceptions of settings."""

from schemas.errors import FleetError


class SettingsError(FleetError):
    """Settings that cannot work, or a configuration file that cannot be read. Its text has a line for each of them."""
