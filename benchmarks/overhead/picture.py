"""Picture: the edge's processor time for a verdict, by part."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.overhead.report import ENGINE, Share
from schemas.errors import FleetError

__all__ = ["draw"]


def draw(shares: Sequence[Share], file: Path) -> None:
    """Draw a bar for each load, without the engine's own time.

    Raises:
        FleetError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError:
        raise FleetError("A picture needs matplotlib: run `make bench` once.") from None
    figure = Figure(figsize=(8.0, 1.2 + 0.8 * len(shares)), layout="constrained")
    axes = figure.add_subplot()
    names = sorted({part for share in shares for part in share.parts if part != ENGINE})
    left = [0.0] * len(shares)
    for name in names:
        widths = [share.parts.get(name, 0.0) for share in shares]
        axes.barh(range(len(shares)), widths, left=left, label=name)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(shares)), [share.load for share in shares])
    axes.invert_yaxis()
    axes.set_xlabel("processor time of a verdict beside the engine's, microseconds")
    axes.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.savefig(file, dpi=120)
