"""Picture: tokens a second over distance and over the width of the line, and bytes a token, for the paper's systems."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.paper.comparison import SYSTEMS, Place
from schemas.errors import FleetError

__all__ = ["draw"]

_COLOURS: Final = ("#0072b2", "#d55e00", "#e69f00", "#cc79a7", "#8c6bb1", "#006d2c")


def draw(places: Sequence[Place], sizes: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw them, for the first cost and draft model.

    Raises:
        FleetError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError:
        raise FleetError("A picture needs matplotlib: run `make bench` once.") from None
    figure = Figure(figsize=(14.0, 4.2), layout="constrained")
    far, narrow, bars = (figure.add_subplot(1, 3, place) for place in (1, 2, 3))
    same = [place for place in places if (place.cost, place.draft) == (places[0].cost, places[0].draft)]
    widest = max((place.mbit_s for place in same), default=0.0)
    distance = next((place.rtt_ms for place in same if place.mbit_s != widest), 0.0)
    for system, colour in zip(SYSTEMS, _COLOURS, strict=True):
        by_distance = sorted(
            (place.rtt_ms, place.tokens_per_s[system])
            for place in same
            if place.mbit_s == widest and system in place.tokens_per_s
        )
        by_width = sorted(
            (place.mbit_s, place.tokens_per_s[system])
            for place in same
            if place.rtt_ms == distance and system in place.tokens_per_s
        )
        for axes, points in ((far, by_distance), (narrow, by_width)):
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=system)
        row = next(
            (
                row
                for row in sizes
                if row["system"] == system and row.get("draft_length") in {None, 4} and not row.get("stops")
            ),
            None,
        )
        if row is not None:
            at = SYSTEMS.index(system)
            bars.bar(at - 0.2, row["uplink_bytes_per_token"], 0.4, color=colour)
            bars.bar(at + 0.2, row["downlink_bytes_per_token"], 0.4, color=colour, alpha=0.5)
    far.set_xlabel(f"round trip, ms (line of {widest:g} Mbit/s)")
    narrow.set_xlabel(f"width of the line, Mbit/s (round trip {distance:g} ms)")
    narrow.set_xscale("log")
    for axes in (far, narrow):
        axes.set_ylabel("tokens a second")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    far.legend(fontsize="small")
    bars.set_yscale("log")
    bars.set_xticks(range(len(SYSTEMS)), SYSTEMS, rotation=30, ha="right")
    bars.set_ylabel("payload, bytes a token (left up, right down)")
    figure.savefig(file, dpi=120)
