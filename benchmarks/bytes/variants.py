"""Variants: the systems that are compared, each in the modes and with the draft lengths that it has."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from benchmarks.latency.systems import CO_LOCATED, DEVICE_ALONE, DRAFT
from dssd.downlink import Form
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import STREAMED, FixedPacing, Pacing, Plan
from schemas.policy import Mode

__all__ = ["LENGTHS", "Variant", "variants"]

_WORTH: Final = 1 / 6
"""Two bytes up beside the dozen that a committed token costs both ways."""

LENGTHS: Final = (2, 4, 8, 16)
"""Tokens of a draft, where more than one length is measured."""


@dataclass(frozen=True, slots=True)
class SavingPacing(FixedPacing):
    """Draft for as few bytes as possible: on as long as all of the draft would stand with probability `_WORTH`.

    That is taken from the probabilities with which the draft's tokens were drawn: tokens that are drawn are sent.
    """

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the plan."""
        del longest, window
        return Plan(self.tokens, may_stop=True)

    def goes_on(self, chances: Sequence[float]) -> bool:
        """Return whether the next token is worth its bytes."""
        return prod(chances) >= _WORTH


@dataclass(frozen=True, slots=True)
class Variant:
    """One way over the network.

    Attributes:
        system: Its name in all benchmarks.
        mode: Of verification.
        length: Tokens of a draft; None where there are no drafts, or the device chooses.
        form: Of the distribution that comes down after a rejection.
        ahead: Whether the device drafts on before the verdict.
        full_up: Whether the draft model's full distributions go up with each draft.
        stops: Whether a draft ends where its next token would hardly be worth its bytes; `length` is the most then.
    """

    system: str
    mode: Mode
    length: int | None = None
    form: Form = Form.AUTO
    ahead: bool = False
    full_up: bool = False
    stops: bool = False

    @property
    def local(self) -> bool:
        """Whether no draft is sent."""
        return self.system in {DEVICE_ALONE, CO_LOCATED}

    def pacing(self) -> Pacing:
        """Return the pacing of a device."""
        if self.stops:
            return SavingPacing(self.length or 0)
        if self.length is not None:
            return FixedPacing(self.length, ahead=self.ahead)
        if self.system == "edge-streaming":
            return FixedPacing(STREAMED, stream=True)
        return AdaptivePacing(stream=None)


def variants(lengths: Sequence[int] = LENGTHS) -> Iterator[Variant]:
    """Yield all of them; `DRAFT` tokens are in each draft where only one length is measured."""
    yield Variant(DEVICE_ALONE, Mode.COUPLED)
    yield Variant(CO_LOCATED, Mode.COUPLED, DRAFT)
    for mode in Mode:
        yield Variant("edge-streaming", mode)
    yield Variant("dsd", Mode.RESIDUAL, DRAFT, full_up=True)
    yield Variant("dssd-dense", Mode.RESIDUAL, DRAFT, form=Form.DENSE)
    for mode in Mode:
        for length in lengths:
            yield Variant(f"ours-{mode.value}", mode, length)
        yield Variant(f"ours-{mode.value}", mode, max(lengths), stops=True)
    for mode in Mode:
        yield Variant("ours-ahead", mode, DRAFT, ahead=True)
    for mode in Mode:
        yield Variant("ours-auto", mode)
