"""Systems: the ways to give one device the text of a large model, under one name each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from dssd.downlink import Form
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import STREAMED, FixedPacing, Pacing
from schemas.policy import Mode

__all__ = ["CO_LOCATED", "DEVICE_ALONE", "DRAFT", "LOCAL", "SYSTEMS", "System"]

DEVICE_ALONE: Final = "device-alone"
CO_LOCATED: Final = "co-located"
LOCAL: Final = (DEVICE_ALONE, CO_LOCATED)
"""What runs in this process, and only its text would travel."""

DRAFT: Final = 4
"""Tokens of a draft, where it is fixed: what the published system uses at its shortest."""


@dataclass(frozen=True, slots=True)
class System:
    """One way over the network.

    Attributes:
        what: For the reader.
        pacing: Makes the device's pacing.
        mode: Of verification.
        form: Of the distribution that comes down after a rejection.
        full_up: Whether the device sends its full distributions with each draft, as is done where the edge corrects.
        learns: Whether the device goes by what it has measured, so that its first text at a place tells little.
    """

    what: str
    pacing: Callable[[], Pacing]
    mode: Mode
    form: Form = Form.AUTO
    full_up: bool = False
    learns: bool = False


SYSTEMS: Final[Mapping[str, System]] = MappingProxyType(
    {
        "edge-streaming": System("the edge writes alone", lambda: FixedPacing(STREAMED, stream=True), Mode.RESIDUAL),
        "dsd": System(
            "drafts with the full distributions up, the edge corrects",
            lambda: FixedPacing(DRAFT),
            Mode.RESIDUAL,
            full_up=True,
        ),
        "dssd-dense": System(
            "as published: one probability a token up, all of p down at a rejection",
            lambda: FixedPacing(DRAFT),
            Mode.RESIDUAL,
            Form.DENSE,
        ),
        "ours-residual": System("the smallest form of p down", lambda: FixedPacing(DRAFT), Mode.RESIDUAL),
        "ours-coupled": System("tokens alone, both ways", lambda: FixedPacing(DRAFT), Mode.COUPLED),
        "ours-ahead": System(
            "the device drafts on before the verdict", lambda: FixedPacing(DRAFT, ahead=True), Mode.COUPLED
        ),
        "ours-auto": System("the device chooses", lambda: AdaptivePacing(stream=None), Mode.RESIDUAL, learns=True),
    }
)
"""By name."""
