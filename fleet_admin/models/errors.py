"""Errors of this package."""

from schemas.errors import FleetError


class ModelsError(FleetError):
    """Base of the errors of this package."""


class ModelUnreadable(ModelsError):  # noqa: N818 - reads as what it says
    """The file or folder is no readable model."""
