"""Report of the overhead benchmark: where time goes, the goals, and the rows that all benchmarks share."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from benchmarks.overhead.measures import Answers, Saturation

__all__ = ["ENGINE", "Goal", "Share", "goals_of", "lines_of", "rows_of"]

ENGINE: Final = "engine"
"""The part that is the model's, and not the edge's own."""

SCRIPTED: Final = "scripted"
_ECHOES: Final = 2.5
_PER_S: Final = 2000.0
_OWN: Final = 0.10


@dataclass(frozen=True, slots=True)
class Share:
    """Where an edge's processor time went.

    Attributes:
        load: Engine and mode.
        devices: That wrote at once.
        verdicts: Given meanwhile.
        steps: In which they were.
        parts: Microseconds for each verdict, by part, the greatest first.
        wrong: Verdicts that were not as recorded.
    """

    load: str
    devices: int
    verdicts: int
    steps: int
    parts: Mapping[str, float]
    wrong: int = 0

    @classmethod
    def of(cls, load: str, devices: int, ended: Mapping[str, Any], *, wrong: int = 0) -> Self:
        """Make it of what a sampled edge tells at its end."""
        verifying = [number for _, _, number in ended["steps"] if number]
        verdicts = sum(verifying)
        parts = {part: seconds / max(1, verdicts) * 1e6 for part, seconds in ended["parts"].items()}
        return cls(load, devices, verdicts, len(verifying), parts, wrong)

    @property
    def own(self) -> float:
        """Share of what is not the engine's."""
        total = sum(self.parts.values())
        return 1.0 - self.parts.get(ENGINE, 0.0) / total if total else 0.0

    @property
    def scripted(self) -> bool:
        """Whether there is no real model."""
        return self.load.startswith(SCRIPTED)

    def json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "parts_us": dict(self.parts), "own_share": self.own}


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal and what was found.

    Attributes:
        what: Of the goal.
        value: Found.
        goal: To be reached.
        reached: Whether it is.
    """

    what: str
    value: float
    goal: float
    reached: bool

    @property
    def sentence(self) -> str:
        """For the reader."""
        return f"{self.what} {self.value:,.2f} (goal {self.goal:,g}): {'reached' if self.reached else 'MISSED'}"

    def json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def goals_of(answers: Sequence[Answers], saturations: Sequence[Saturation], shares: Sequence[Share]) -> list[Goal]:
    """Hold what was found against the goals."""
    echo, *verdicts = answers
    goals = []
    for each in verdicts:
        ratio = each.p50_ms / echo.p50_ms
        goals.append(Goal(f"median of a verdict beside the echo's, {each.of}:", ratio, _ECHOES, ratio <= _ECHOES))
    goals += [
        Goal(f"verdicts a second, {load.mode}:", load.per_s, _PER_S, load.per_s >= _PER_S) for load in saturations
    ]
    for share in shares:
        if not share.scripted:
            what = f"the edge's own share of a step, {share.load}, {share.devices} devices:"
            goals.append(Goal(what, share.own, _OWN, share.own <= _OWN))
    return goals


def lines_of(answers: Sequence[Answers], saturations: Sequence[Saturation], shares: Sequence[Share]) -> Iterator[str]:
    """Yield the lines of a report."""
    yield f"{'one device':<28}{'answers':>9}{'p50 ms':>9}{'p99 ms':>9}"
    for answer in answers:
        yield f"  {answer.of:<26}{answer.number:9}{answer.p50_ms:9.2f}{answer.p99_ms:9.2f}"
    head = ("verdicts/s", "p50 ms", "p99 ms", "us/verdict", "edge", "broker", "devices")
    yield f"{'at saturation':<28}" + "".join(f"{word:>11}" for word in head) + "  limit"
    for load in saturations:
        figures = f"{load.per_s:11.0f}{load.p50_ms:11.2f}{load.p99_ms:11.2f}{load.cpu_us:11.0f}"
        busy = f"{load.edge:11.0%}{load.broker:11.0%}{load.load:11.0%}"
        yield f"  {f'{load.mode}, {load.devices} devices':<26}{figures}{busy}  {load.limit}"
        if load.wrong:
            yield f"  {load.wrong} verdicts were not as recorded"
    for share in shares:
        parts = ", ".join(f"{part} {micros:.0f}" for part, micros in share.parts.items())
        batch = share.verdicts / max(1, share.steps)
        yield f"processor time of a verdict, us ({share.load}, {batch:.1f} in a step): {parts}"


def rows_of(
    answers: Sequence[Answers], saturations: Sequence[Saturation], shares: Sequence[Share]
) -> list[dict[str, Any]]:
    """Return the rows, in the columns that all benchmarks share and in their own."""
    common: dict[str, Any] = {
        "draft": SCRIPTED, "cost": None, "rtt_ms": 0.0, "mbit_s": None, "tokens_per_s": None, "ttft_ms": None,
        "uplink_bytes_per_token": None, "downlink_bytes_per_token": None,
    }  # fmt: skip
    rows = [
        {**common, "system": _system(each.of), "devices": 1, "p50_ms": each.p50_ms, "p99_ms": each.p99_ms}
        for each in answers
    ]
    rows += [
        {
            **common,
            "system": _system(each.mode),
            "devices": each.devices,
            "p50_ms": each.p50_ms,
            "p99_ms": each.p99_ms,
            "verdicts_per_s": each.per_s,
            "edge_cpu_us": each.cpu_us,
            "limit": each.limit,
        }
        for each in saturations
    ]
    rows += [
        {**common, "system": _system(each.load.split(", ")[1]), "devices": each.devices, "own_share": each.own}
        for each in shares
        if not each.scripted
    ]
    return rows


def _system(mode: str) -> str:
    return mode if mode == "echo" else f"ours-{mode}"
