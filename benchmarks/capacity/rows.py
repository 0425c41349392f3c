"""Rows: what one system gave so many devices, as JSON and as the table that people read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from benchmarks.capacity.arrivals import Arrivals
from fleet_cli.edge.advise.service_level import LEVEL, Client, Window

__all__ = ["HEAD", "Row", "line", "table"]

_LOAD_LIMIT: Final = 0.85
"""Cores: devices and line are one process of Python, which computes on one core at a time."""


@dataclass(slots=True)
class Row:
    """What one system did in one cell.

    Attributes:
        system: Its name.
        draft: The draft model's, empty where there is none.
        cost: How many times the target costs what the demo's does.
        devices: That write at the same time.
        rtt_ms: There and back.
        mbit_s: Width of the line, each way; 0 is none.
        arrivals: How they ask.
        tokens_per_s: Committed in the window, of all devices together.
        ttft_ms: Time to the first token: the median over texts, those that have waited in vain with their wait.
        clients_at_level: Devices that got the service level.
        pace: Tokens a second while texts are written: the median over devices.
        gap_p95_ms: Time between tokens at the 95th percentile: the median over devices; None where there was none.
        uplink_bytes_per_token: Payload.
        downlink_bytes_per_token: Payload.
        acceptance: Accepted of tested draft tokens; None where none was tested.
        streamed: Share of the tokens that the edge wrote by itself.
        mean_draft: Tokens of a draft; None where there was none.
        as_recorded: Share of the whole texts that came out as recorded; None where nothing is replayed.
        text_tokens: Mean length of the texts, those that were cut off too; None where nothing is replayed.
        draft_token_ms: Of the draft model that is replayed.
        edge_cpu: Cores that the edge took.
        load_cpu: Cores that devices, line and broker took, beside it or on its own.
        window_s: How long was counted.
        failed: Texts that were not written, by reason.
    """

    system: str
    draft: str
    cost: int
    devices: int
    rtt_ms: float
    mbit_s: float
    arrivals: Arrivals
    tokens_per_s: float = 0.0
    ttft_ms: float = 0.0
    clients_at_level: int = 0
    pace: float = 0.0
    gap_p95_ms: float | None = None
    uplink_bytes_per_token: float = 0.0
    downlink_bytes_per_token: float = 0.0
    acceptance: float | None = None
    streamed: float | None = None
    mean_draft: float | None = None
    as_recorded: float | None = None
    text_tokens: float | None = None
    draft_token_ms: float | None = None
    edge_cpu: float | None = None
    load_cpu: float | None = None
    window_s: float = 0.0
    failed: dict[str, int] = field(default_factory=dict)

    @property
    def load_bound(self) -> bool:
        """Whether devices and line took nearly all that one process can: the edge might have done more."""
        return self.load_cpu is not None and self.load_cpu > _LOAD_LIMIT

    def count(self, clients: Sequence[Client], window: Window, *, travel_s: float = 0.0) -> None:
        """Reckon what clients got.

        Args:
            clients: All.
            window: In which it counts.
            travel_s: What a line would add to the time to the first token, where there was none.
        """
        self.window_s = window.seconds
        self.tokens_per_s = sum(client.tokens(window) for client in clients) / window.seconds
        waits = [text.first_s(window.end) for client in clients for text in client.texts if text.asked_at < window.end]
        self.ttft_ms = 1e3 * (median(waits) + travel_s) if waits else 0.0
        self.clients_at_level = sum(client.at_level(window) for client in clients)
        self.pace = median(client.pace(window) for client in clients)
        gaps = [gap for client in clients if (gap := client.gap_s(window)) is not None]
        self.gap_p95_ms = 1e3 * median(gaps) if gaps else None


HEAD: Final = (
    f"{'system':<23} {'draft':<5} {'cost':>4} {'devices':>7} {'arrivals':<8} {'tokens/s':>8} {'at level':>8} "
    f"{'each, tok/s':>11} {'p95 gap, ms':>11} {'first, ms':>9} {'up, B/tok':>9} {'down':>7} {'accept.':>7} "
    f"{'streamed':>8} {'edge':>5} {'load':>5}"
)


def line(row: Row) -> str:
    """Return a row as a line under `HEAD`; cores of edge and load at its end."""

    def show(value: float | None, form: str, width: int) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    return (
        f"{row.system:<23} {row.draft or '-':<5} {row.cost:>4} {row.devices:>7} {row.arrivals:<8} "
        f"{row.tokens_per_s:8.1f} {row.clients_at_level:>8} {row.pace:11.1f} {show(row.gap_p95_ms, '.0f', 11)} "
        f"{row.ttft_ms:9.0f} {row.uplink_bytes_per_token:9.1f} {row.downlink_bytes_per_token:7.1f} "
        f"{show(row.acceptance, '.2f', 7)} {show(row.streamed, '.0%', 8)} {show(row.edge_cpu, '.2f', 5)} "
        f"{show(row.load_cpu, '.2f', 5)}"
    )


def table(rows: Sequence[Row]) -> str:
    """Return, for each kind of cell, how many clients got the service level and all tokens a second, by system."""
    kinds = sorted({(row.arrivals, row.cost, row.draft) for row in rows if row.draft})
    plain = {(row.arrivals, row.cost) for row in rows} - {(arrivals, cost) for arrivals, cost, _ in kinds}
    lines = []
    for arrivals, cost, draft in [*kinds, *((arrivals, cost, "") for arrivals, cost in sorted(plain))]:
        here = [row for row in rows if (row.arrivals, row.cost) == (arrivals, cost) and row.draft in (draft, "")]
        loads = sorted({row.devices for row in here})
        level = (
            f"Clients at a service level (each at least {LEVEL.tokens_per_s:g} tokens/s, 95 % of the waits between "
            f"tokens within {LEVEL.gap_s * 1e3:.0f} ms), and tokens/s of all"
        )
        where = f"target of {cost} times the cost, draft {draft or '-'}, arrivals {arrivals}"
        lines += ["", f"{level}:", f"{where}, round trip {here[0].rtt_ms:g} ms"]
        lines.append(f"  {'devices':<23}" + "".join(f"{load:>16}" for load in loads))
        for system in dict.fromkeys(row.system for row in here):
            cells = {row.devices: row for row in here if row.system == system}
            shown = [
                f"{cells[load].clients_at_level:>6} ({cells[load].tokens_per_s:.1f}/s){'*' * cells[load].load_bound}"
                if load in cells
                else "-"
                for load in loads
            ]
            lines.append(f"  {system:<23}" + "".join(f"{each:>16}" for each in shown))
    if any(row.load_bound for row in rows):
        lines.append(f"* Devices and line took more than {_LOAD_LIMIT:g} cores: the edge might have done more.")
    return "\n".join(lines)
