"""Errors of the command line."""

from schemas.errors import FleetError

__all__ = ["CommandError"]


class CommandError(FleetError):
    """A command cannot do what it was asked. Its text is one sentence for the user."""
