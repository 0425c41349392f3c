"""Systems: what serves many clients from the cores of one edge, under one name each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fleet_bench.latency.systems import CO_LOCATED, DRAFT, SYSTEMS, System

__all__ = ["ALL", "CO_LOCATED", "DRAFT", "RAW", "STANDARD", "THROUGH_BROKER", "drafts"]

RAW: Final = "raw-engine"

THROUGH_BROKER: Final[Mapping[str, System]] = MappingProxyType(
    {name: system for name, system in SYSTEMS.items() if not system.full_up}
)
"""Those that a device has part in; where full distributions go up the line is the limit, not the edge."""

ALL: Final = (RAW, CO_LOCATED, *THROUGH_BROKER)

STANDARD: Final = ("edge-streaming", RAW, CO_LOCATED, "dssd-dense", "ours-auto")
"""Those that are measured unless others are asked for."""


def drafts(system: str) -> bool:
    """Whether a draft model has part in it."""
    return system not in (RAW, "edge-streaming")
