"""Timeline of a session's rounds: where the time of each went, on the device, on the link, and at the edge.

An edge knows when a draft came and what it did until the verdict. What lies between a verdict and the next draft is the
device's drafting and the link both ways; of that, the device's own mean time for a token says which part was drafting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from fleet_edge.store.views import RoundView, SessionView

_MILLISECOND: Final = timedelta(milliseconds=1)

STRETCHES: Final = (
    ("draft", "drafting, by the device's mean time for a token"),
    ("link", "link, both ways"),
    ("away", "drafting and link"),
    ("queue", "waiting for the step"),
    ("prefill", "prompt"),
    ("compute", "step"),
)
"""Kinds of stretches, and what they are."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a round's time.

    Attributes:
        kind: As `STRETCHES` has it.
        begin_ms: Since the first instant that is shown.
        length_ms: How long.
    """

    kind: str
    begin_ms: float
    length_ms: float


@dataclass(frozen=True, slots=True)
class Bar:
    """A round with its stretches, in order; `begin_ms` is that of the first."""

    round: RoundView
    stretches: tuple[Stretch, ...]

    @property
    def begin_ms(self) -> float:
        return self.stretches[0].begin_ms

    @property
    def end_ms(self) -> float:
        last = self.stretches[-1]
        return last.begin_ms + last.length_ms

    def length_of(self, kind: str) -> float | None:
        """Return how long a kind of stretch took; None if there was none."""
        found = [each.length_ms for each in self.stretches if each.kind == kind]
        return sum(found) if found else None


def bars(rounds: Sequence[RoundView], *, session: SessionView, before: datetime) -> list[Bar]:
    """Lay rounds out in time.

    Args:
        rounds: In order.
        session: Whose.
        before: When the verdict before the first was given, or the session was opened.
    """
    each_ms = _draft_ms(session)
    found, origin, last = list[Bar](), before, before
    for each in rounds:
        at_edge = [("queue", each.queue_ms), ("prefill", each.prefill_ms), ("compute", each.compute_ms)]
        arrived = each.at - sum(length for _, length in at_edge) * _MILLISECOND
        away_ms = (arrived - last) / _MILLISECOND
        begin = arrived
        stretches = list[tuple[str, float]]()
        # A draft that came before the last verdict was made ahead of it: nobody has waited for it.
        if away_ms > 0:
            begin = last
            if each_ms is None:
                stretches.append(("away", away_ms))
            else:
                draft_ms = min(each.drafted * each_ms, away_ms)
                stretches += [("draft", draft_ms), ("link", away_ms - draft_ms)]
        found.append(_bar(each, [*stretches, *at_edge], begin_ms=(begin - origin) / _MILLISECOND))
        last = max(last, each.at)
    return found


def scale(shown: Sequence[Bar]) -> tuple[float, float]:
    """Return where a picture of these bars begins and how long it is, in milliseconds."""
    begin = min((bar.begin_ms for bar in shown), default=0.0)
    return begin, max(max((bar.end_ms for bar in shown), default=0.0) - begin, 1e-3)


def _draft_ms(session: SessionView) -> float | None:
    """Return what drafting a token took on average; None if the device has not told, or drafted nothing."""
    if not session.device_drafted or session.device_draft_ms is None:
        return None
    return session.device_draft_ms / session.device_drafted


def _bar(round_: RoundView, lengths: Sequence[tuple[str, float]], *, begin_ms: float) -> Bar:
    stretches, at = list[Stretch](), begin_ms
    for kind, length in lengths:
        if length > 0 or kind == "compute":
            stretches.append(Stretch(kind, at, max(length, 0.0)))
        at += max(length, 0.0)
    return Bar(round_, tuple(stretches))
