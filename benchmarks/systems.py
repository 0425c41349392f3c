"""Systems: the ways to give a device a large model's output, with one name each in all suites."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from benchmarks.harness import edge_only_pacing
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import FixedPacing, Pacing
from sampling.downlink import FormName
from schemas.policy import Mode

DRAFT: Final = 4
"""Tokens of a fixed draft: the shortest of the published system."""


@dataclass(frozen=True, slots=True)
class System:
    pacing: Callable[[], Pacing]
    mode: Mode
    form: FormName = FormName.AUTO
    learns: bool = False
    edge_drafts: bool = False


SYSTEMS: Final[Mapping[str, System]] = MappingProxyType(
    {
        "edge-only": System(edge_only_pacing, Mode.RESIDUAL),
        "dssd-dense": System(lambda: FixedPacing(DRAFT), Mode.RESIDUAL, FormName.DENSE),
        "ours-residual": System(lambda: FixedPacing(DRAFT), Mode.RESIDUAL),
        "ours-coupled": System(lambda: FixedPacing(DRAFT), Mode.COUPLED),
        "ours-auto": System(lambda: AdaptivePacing(edge_only=None), Mode.RESIDUAL, learns=True),
    }
)
"""By name. `dssd-dense` is as published: one probability a token up, all of p down at a rejection; `ours-residual`
sends the smallest form of p; `ours-coupled` tokens alone; `ours-auto` chooses."""
