"""Picture: tokens a second over distance, a line for each system."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from schemas.errors import FleetError

__all__ = ["COLOURS", "Point", "draw"]

COLOURS: Final = {
    "device-alone": "#999999",
    "edge-streaming": "#0072b2",
    "co-located": "#56b4e9",
    "dsd": "#d55e00",
    "dssd-dense": "#e69f00",
    "ours-residual": "#cc79a7",
    "ours-coupled": "#8c6bb1",
    "ours-ahead": "#44aa66",
    "ours-auto": "#006d2c",
}


class Point(Protocol):
    """What is drawn of a measurement."""

    system: str
    draft: str
    cost: int
    rtt_ms: float
    mbit_s: float
    tokens_per_s: float


def draw(rows: Sequence[Point], file: Path) -> None:
    """Draw one panel for each cost of the target and draft model, at the widest line.

    Raises:
        FleetError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
        from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415 - likewise
    except ImportError:
        raise FleetError("A picture needs matplotlib: run `make bench` once.") from None
    panels = sorted({(row.cost, row.draft) for row in rows})
    width = max(row.mbit_s for row in rows)
    figure = Figure(figsize=(4.8 * len(panels) + 1.8, 4.2), layout="constrained")
    for place, (cost, draft) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for system, colour in COLOURS.items():
            points = sorted(
                (row.rtt_ms, row.tokens_per_s)
                for row in rows
                if (row.system, row.cost, row.draft, row.mbit_s) == (system, cost, draft, width)
            )
            if points:
                ours = system == "ours-auto"
                axes.plot(
                    *zip(*points, strict=True), marker="o", color=colour, linewidth=3 if ours else 1.5, label=system
                )
        axes.set_title(f"target of {cost} times the cost, draft {draft}")
        axes.set_xlabel(f"round trip, ms (line of {width:g} Mbit/s)")
        axes.set_ylabel("tokens a second")
        axes.set_yscale("log")  # ratios are what is claimed
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(file, dpi=120)
