"""Exceptions of step times."""

from schemas.errors import FleetError


class CurveError(FleetError):
    """A step-time curve cannot be read, written or used. Its text is one sentence for the user."""
