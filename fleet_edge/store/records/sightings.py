"""Sightings: the states of devices and edges, as retained at the broker."""

from dataclasses import dataclass
from datetime import datetime

from schemas.control import Presence

__all__ = ["DeviceSeen", "EdgeSeen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSeen:
    """A device's state, as retained at the broker.

    Attributes:
        device: Its name.
        presence: Online, draining or offline.
        software: Version that it runs.
        draft_model: Name of its draft model.
        quantization: Of its weights.
        at: When the edge saw it (UTC, aware). The latest wins.
    """

    device: str
    presence: Presence
    software: str
    draft_model: str
    quantization: str
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeSeen:
    """An edge's state, as retained at the broker.

    Attributes:
        edge: Its name.
        presence: Online, draining or offline.
        software: Version that it runs.
        target: Name of its target model.
        vocabulary: Size and head of the fingerprint, for the reader's eye.
        at: When it was so (UTC, aware). The latest wins.
    """

    edge: str
    presence: Presence
    software: str
    target: str
    vocabulary: str
    at: datetime
