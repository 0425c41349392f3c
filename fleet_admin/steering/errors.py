"""Exceptions of steering."""

from schemas.errors import FleetError

__all__ = ["SteeringError"]


class SteeringError(FleetError):
    """Devices cannot be steered as was asked. Its text is one sentence for the user."""
