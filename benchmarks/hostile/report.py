"""Report of the attacks: a table for people, JSON for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from benchmarks.hostile.experiment import Result, Timing
from benchmarks.shared.conditions import conditions
from benchmarks.shared.processes import Cores

__all__ = ["HEADER", "line", "met", "report"]

_LEAST_DURING: Final = 0.9
_LEAST_AFTER: Final = 0.9  # what is full recovery within the spread of a ten-second window
_MOST_EDGE_MB: Final = 100.0
_MOST_ROWS: Final = 100.0
_LONGEST_WAIT_S: Final = 1.0

HEADER: Final = (
    f"{'attack':<21} {'base':>6} {'contr.':>6} {'during':>6} {'/contr':>6} {'after':>6} {'edge':>6} {'broker':>6} "
    f"{'rows':>7} {'fresh':>6}  {'CPU: attacker':>13} {'broker':>6} {'edge':>5}  notes\n"
    f"{'':<21} {'tok/s':>6} {'share':>6} {'share':>6} {'share':>6} {'share':>6} {'MB':>6} {'MB':>6} "
    f"{'/min':>7} {'s':>6}  {'cores':>13} {'cores':>6} {'cores':>5}"
)


def line(result: Result) -> str:
    """Return an attack's line of the table."""
    return (
        f"{result.name:<21} {result.baseline:6.1f} {_share(result.honest_control)} {_share(result.honest_during)} "
        f"{_share(result.honest_during_of_control)} {_share(result.honest_after)} {result.edge_rss_mb:6.0f} "
        f"{result.broker_rss_mb:6.0f} {result.rows:7.0f} {result.fresh_device_s:6.2f}  "
        f"{result.cpu.get('attacker', 0.0):13.2f} {result.cpu.get('broker', 0.0):6.2f} "
        f"{result.cpu.get('edge', 0.0):5.2f}  {', '.join(_notes(result))}"
    )


def met(result: Result) -> bool:
    """Return whether the fleet has held out as it should."""
    during = max(result.honest_during, result.honest_during_of_control or 0.0)
    return (
        during >= _LEAST_DURING
        and result.honest_after >= _LEAST_AFTER
        and result.edge_rss_mb <= _MOST_EDGE_MB
        and result.rows <= _MOST_ROWS
        and result.fresh_device_s <= _LONGEST_WAIT_S
        and not (result.edge_died or result.broker_died or result.differing_texts)
    )


def report(results: Sequence[Result], *, timing: Timing, cores: Cores, settings: dict[str, Any]) -> dict[str, Any]:
    """Return everything as JSON values; shares are of the same attack's baseline."""
    return {
        "attacks": [{**asdict(result), "met": met(result)} for result in results],
        "timing_s": asdict(timing),
        "cores": {"edge": sorted(cores.edge), "others": sorted(cores.others)},
        "settings": settings,
        **conditions("paho-mqtt", "torch", "transformers", "sqlalchemy", broker=True),
    }


def _share(value: float | None) -> str:
    return f"{'-':>6}" if value is None else f"{value:6.2f}"


def _notes(result: Result) -> list[str]:
    notes = ["ok" if met(result) else "NOT MET"]
    notes += ["EDGE DIED"] * result.edge_died + ["BROKER DIED"] * result.broker_died
    notes += ["slowed"] * result.slowed + ["fenced"] * result.fenced
    if result.kicked:
        notes.append("kicked " + " ".join(f"{count}x{why}" for why, count in result.kicked.items()))
    if result.failed_texts:
        notes.append(f"{len(result.failed_texts)} honest texts failed")
    if result.differing_texts:
        notes.append(f"{result.differing_texts} honest texts ALTERED")
    return notes
