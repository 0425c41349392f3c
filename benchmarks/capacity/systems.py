"""Systems: what serves many clients from the cores of one edge, under one name each."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from benchmarks.latency.systems import CO_LOCATED, DRAFT, SYSTEMS, System
from schemas.policy import Mode

__all__ = ["ALL", "CO_LOCATED", "DRAFT", "FREE", "RAW", "STANDARD", "THROUGH_BROKER", "drafts", "replays_residual"]

RAW: Final = "raw-engine"

_STREAMING: Final = "edge-streaming"
FREE: Final = "edge-streaming-residual"
"""What the edge writes alone in residual mode: other texts than are recorded, from rows that need not repeat."""

THROUGH_BROKER: Final[Mapping[str, System]] = MappingProxyType(
    {
        name: replace(system, mode=Mode.COUPLED) if system.learns or name == _STREAMING else system
        for name, system in {FREE: SYSTEMS[_STREAMING], **SYSTEMS}.items()
        if not system.full_up
    }
)
"""Those that a device has part in; where full distributions go up the line is the limit, not the edge.

A residual text depends on where drafts begin, so that one whose plan is chosen cannot be replayed; a coupled one can.
What the edge writes alone is coupled as well: the same texts, at the same price of rows that repeat.
"""

ALL: Final = (RAW, CO_LOCATED, *THROUGH_BROKER)

STANDARD: Final = (_STREAMING, FREE, RAW, CO_LOCATED, "dssd-dense", "ours-auto")
"""Those that are measured unless others are asked for."""


def replays_residual(system: str) -> bool:
    """Whether its devices replay drafts that were recorded in residual mode."""
    return drafts(system) and system in THROUGH_BROKER and THROUGH_BROKER[system].mode is Mode.RESIDUAL


def drafts(system: str) -> bool:
    """Whether a draft model has part in it."""
    return system not in (RAW, _STREAMING, FREE)
