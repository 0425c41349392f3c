"""Goals of the bytes benchmark, and whether they are reached."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks.bytes.rows import Row
from benchmarks.latency.systems import DRAFT

__all__ = ["Goal", "goals"]

UPLINK: Final = 10_000
"""Full distributions up are so many times as much, at least."""

DOWNLINK: Final = 200
"""The dense form down is so many times as much, at least."""

BOTH_WAYS: Final = 12.0
"""Payload of coupled mode, bytes a token, at most."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal and what was found.

    Attributes:
        what: Of the goal.
        draft: The draft model.
        value: Found.
        goal: To be reached.
        reached: Whether it is.
    """

    what: str
    draft: str
    value: float
    goal: float
    reached: bool

    @property
    def sentence(self) -> str:
        """For the reader."""
        found = "reached" if self.reached else "MISSED"
        return f"{self.draft}: {self.what} {self.value:,.1f} (goal {self.goal:,g}): {found}"

    def json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def goals(rows: Sequence[Row]) -> list[Goal]:
    """Hold rows against the goals, for each draft model."""
    return [goal for draft in dict.fromkeys(row.draft for row in rows) for goal in _goals(draft, rows)]


def _goals(draft: str, rows: Sequence[Row]) -> Iterator[Goal]:
    mine = [row for row in rows if row.draft == draft]
    at_length = {row.system: row for row in mine if row.draft_length == DRAFT and not row.stops}
    dsd, dense = at_length.get("dsd"), at_length.get("dssd-dense")
    for system in ("ours-residual", "ours-coupled"):
        ours = at_length.get(system)
        if dsd and ours:
            ratio = dsd.uplink_bytes_per_token / ours.uplink_bytes_per_token
            yield Goal(f"DSD's uplink beside that of {system}", draft, ratio, UPLINK, ratio >= UPLINK)
    residual = at_length.get("ours-residual")
    if dense and residual:
        ratio = dense.downlink_bytes_per_token / residual.downlink_bytes_per_token
        yield Goal("the dense downlink beside that of ours-residual", draft, ratio, DOWNLINK, ratio >= DOWNLINK)
    coupled = [row for row in mine if row.system == "ours-coupled"]
    if coupled:
        best = min(coupled, key=lambda row: row.both_ways)
        drafts = f"up to {best.draft_length}" if best.stops else str(best.draft_length)
        what = f"payload both ways of ours-coupled, drafts of {drafts} tokens, bytes a token"
        yield Goal(what, draft, best.both_ways, BOTH_WAYS, best.both_ways <= BOTH_WAYS)
