"""Exceptions of alerts."""

from schemas.errors import FleetError


class AlertError(FleetError):
    """Base. The text is one sentence for the user."""


class NoSuchAlert(AlertError):  # noqa: N818 - reads as what it says
    """There is no alert of that id, or several begin with it."""


class DeliveryFailed(AlertError):  # noqa: N818 - likewise
    """An alert could not be told to somebody; it may be worth another attempt."""
