"""Picture: bytes a token of each system, up and down, on a logarithmic axis."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.bytes.rows import Row
from benchmarks.latency.systems import DRAFT
from schemas.errors import FleetError

__all__ = ["draw", "figure_class"]

_UP: Final = "#d55e00"
_DOWN: Final = "#0072b2"


def figure_class() -> Any:  # noqa: ANN401 - an extra's
    """Return matplotlib's class of figures.

    Raises:
        FleetError: It is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError:
        raise FleetError("A picture needs matplotlib: run `make bench` once.") from None
    return Figure


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw a panel for each draft model.

    Raises:
        FleetError: matplotlib is not installed.
    """
    drafts = list(dict.fromkeys(row.draft for row in rows))
    figure = figure_class()(figsize=(6.4 * len(drafts), 4.8), layout="constrained")
    for place, draft in enumerate(drafts, start=1):
        shown = [
            row
            for row in rows
            if row.draft == draft and row.both_ways and not row.stops and row.draft_length in {None, DRAFT}
        ]
        axes = figure.add_subplot(1, len(drafts), place)
        names = [
            row.system if sum(row.system == other.system for other in shown) == 1 else f"{row.system}, {row.mode}"
            for row in shown
        ]
        middle = range(len(shown))
        axes.barh(
            [at - 0.2 for at in middle], [row.uplink_bytes_per_token for row in shown], 0.4, color=_UP, label="up"
        )
        axes.barh(
            [at + 0.2 for at in middle], [row.downlink_bytes_per_token for row in shown], 0.4, color=_DOWN, label="down"
        )
        axes.set_yticks(list(middle), names)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("payload, bytes a token")
        axes.set_title(f"draft {draft}")
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(file, dpi=120)
