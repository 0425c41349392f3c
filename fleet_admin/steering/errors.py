"""Exceptions of steering."""

from schemas.errors import FleetError


class SteeringError(FleetError):
    """Devices cannot be steered as was asked. Its text is one sentence for the user."""
