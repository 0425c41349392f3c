"""Report on faults: a table for people, JSON for programs."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from benchmarks.faults.experiment import Result
from benchmarks.faults.fleet import Load
from benchmarks.shared.conditions import conditions

__all__ = ["HEADER", "line", "percentile", "report"]

HEADER: Final = (
    f"{'fault':<15} {'moments':>7} {'texts':>12} {'tokens':>8} {'altered':>8} {'lost':>6} {'log':>5} {'told':>5} "
    f"{'resumes':>8} {'recovery p50':>13} {'p95':>6} {'longest':>8}\n"
    f"{'':<15} {'':>7} {'coup./resid.':>12} {'':>8} {'texts':>8} {'texts':>6} {'rows':>5} {'texts':>5} "
    f"{'':>8} {'s':>13} {'s':>6} {'s':>8}"
)


def line(result: Result) -> str:
    """Return a fault's line of the table."""
    texts = f"{result.texts.get('coupled', 0)}/{result.texts.get('residual', 0)}"
    recovery = [percentile(result.recovery_s, share) for share in (0.5, 0.95, 1.0)]
    notes = [] if result.exact else ["NOT EXACT"]
    notes += [f"{result.stuck} devices STUCK"] * bool(result.stuck)
    notes += [result.how] * bool(result.how)
    return (
        f"{result.name:<15} {result.moments:>7} {texts:>12} {result.tokens:>8} {sum(result.wrong.values()):>8} "
        f"{len(result.broken_off):>6} {len(result.disagreements):>5} {len(result.told):>5} {result.resumes:>8} "
        f"{recovery[0]:>13.2f} {recovery[1]:>6.2f} {recovery[2]:>8.2f}  {', '.join(notes)}"
    ).rstrip()


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lies; 0 of none."""
    if len(values) < 2:
        return values[0] if values else 0.0
    ordered = sorted(values)
    if share >= 1.0:
        return ordered[-1]
    return statistics.quantiles(ordered, n=100, method="inclusive")[round(share * 100) - 1]


def report(results: Sequence[Result], *, load: Load, settings: dict[str, Any]) -> dict[str, Any]:
    """Return everything as JSON values."""
    return {
        "faults": [_row(result) for result in results],
        "load": asdict(load),
        "settings": settings,
        **conditions("paho-mqtt", "sqlalchemy", broker=True),
    }


def _row(result: Result) -> dict[str, Any]:
    shares = {"p50": 0.5, "p95": 0.95, "longest": 1.0}
    recovery = {name: round(percentile(result.recovery_s, share), 3) for name, share in shares.items()}
    fields = {name: value for name, value in asdict(result).items() if name != "recovery_s"}
    return {**fields, "exact": result.exact, "recovery_s": {**recovery, "samples": len(result.recovery_s)}}
