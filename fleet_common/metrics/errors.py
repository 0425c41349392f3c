"""Exceptions of the metrics."""

from schemas.errors import FleetError


class MetricsError(FleetError):
    """Base: the metrics' endpoint cannot serve. The text is one sentence for the user."""


class MetricsUnavailable(MetricsError):  # noqa: N818 - reads as what it says
    """A library that metrics need is missing."""
