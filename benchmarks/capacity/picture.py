"""Picture: clients at the service level over devices, and tokens a second of all, a line for each system."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.capacity.arrivals import Arrivals
from benchmarks.capacity.rows import Row
from benchmarks.capacity.systems import FREE, RAW
from benchmarks.latency.picture import COLOURS
from schemas.errors import FleetError

__all__ = ["draw"]

_OWN: Final = {RAW: "#333333", FREE: "#7fb8d8"}
"""Colours of what is measured here alone."""


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw two panels for each cost of the target and draft model.

    Raises:
        FleetError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError:
        raise FleetError("A picture needs matplotlib: run `make bench` once.") from None
    if not rows:
        raise FleetError("There is nothing to draw: no cell was measured.")
    arrivals = Arrivals.AT_ONCE if any(row.arrivals is Arrivals.AT_ONCE for row in rows) else Arrivals.POISSON
    rows = [row for row in rows if row.arrivals is arrivals]
    panels = sorted({(row.cost, row.draft) for row in rows if row.draft} or {(row.cost, "") for row in rows})
    figure = Figure(figsize=(4.6 * len(panels), 7.6), layout="constrained")
    for place, (cost, draft) in enumerate(panels, start=1):
        levels = figure.add_subplot(2, len(panels), place)
        paces = figure.add_subplot(2, len(panels), len(panels) + place)
        for system, colour in (_OWN | COLOURS).items():
            points = sorted(
                (row.devices, row.clients_at_level, row.tokens_per_s)
                for row in rows
                if (row.system, row.cost) == (system, cost) and row.draft in ("", draft)
            )
            if points:
                width = 3.0 if system == "ours-auto" else 1.5
                loads, at_level, tokens = zip(*points, strict=True)
                levels.plot(loads, at_level, marker="o", color=colour, linewidth=width, label=system)
                paces.plot(loads, tokens, marker="o", color=colour, linewidth=width, label=system)
        levels.set_title(f"target of {cost} times the cost, draft {draft or 'none'}")
        levels.set_ylabel("clients at the service level")
        paces.set_ylabel("tokens a second, all together")
        for axes in (levels, paces):
            axes.set_xscale("symlog", base=2, linthresh=1)
            axes.set_xticks(sorted({row.devices for row in rows}), [str(n) for n in sorted({r.devices for r in rows})])
            axes.set_xlabel(f"devices, round trip {rows[0].rtt_ms:g} ms")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(file, dpi=120)
