"""Report of the demo: a table for the reader, JSON for programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

__all__ = ["Report", "device_row"]

_FLOAT32 = 4
_TOKEN_ID = 2


def device_row(result: dict[str, Any]) -> dict[str, Any]:
    """Turn a device's result into the report's row.

    `dsd_uplink_bytes_per_token` is computed, not sent: what plain distributed speculative decoding would ship up for
    the same drafts, a float32 probability for every token of the vocabulary and the token's id, for each drafted
    token.
    """
    tokens = max(1, result["tokens"])
    return {
        "device": result["device"],
        "session": result["session"],
        "seed": result["seed"],
        "prompt_tokens": result["prompt_tokens"],
        "tokens": result["tokens"],
        "tokens_per_s": round(result["tokens_per_s"], 2),
        "acceptance": None if result["acceptance"] is None else round(result["acceptance"], 4),
        "rounds": result["rounds"],
        "mean_batch": None if result["mean_batch"] is None else round(result["mean_batch"], 2),
        "uplink_bytes": result["uplink_bytes"],
        "downlink_bytes": result["downlink_bytes"],
        "uplink_bytes_per_token": round(result["uplink_bytes"] / tokens, 1),
        "downlink_bytes_per_token": round(result["downlink_bytes"] / tokens, 1),
        "dsd_uplink_bytes_per_token": round(
            result["drafted"] * (_FLOAT32 * result["vocabulary"] + _TOKEN_ID) / tokens, 1
        ),
        "finish": result["finish"],
        "text": result["text"],
    }


@dataclass(frozen=True, slots=True)
class Report:
    """A finished demo.

    Attributes:
        broker: Which, and where.
        mode: Of verification.
        draft: Draft model.
        target: Target model.
        wall_s: From the devices' start to the last one's end.
        devices: Rows of `device_row`.
    """

    broker: str
    mode: str
    draft: str
    target: str
    wall_s: float
    devices: Sequence[dict[str, Any]]

    def json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "broker": self.broker,
            "mode": self.mode,
            "draft": self.draft,
            "target": self.target,
            "wall_s": round(self.wall_s, 3),
            "devices": list(self.devices),
        }

    def table(self) -> Table:
        """Return it as a table."""
        tokens = sum(row["tokens"] for row in self.devices)
        table = Table(
            title=f"{self.mode} mode, draft {self.draft}, target {self.target}, over {self.broker}",
            caption=f"{tokens} tokens in {self.wall_s:.1f} s. Bytes are payload. * computed: what shipping the draft "
            "model's full distributions up would have cost.",
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            padding=0,
            pad_edge=False,
        )
        table.add_column("device", no_wrap=True)
        for heading in (
            "tokens",
            "tokens\n/s",
            "accep-\ntance",
            "rounds",
            "mean\nbatch",
            "up B\n/token",
            "down B\n/token",
            "DSD up*\n/token",
        ):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("end", no_wrap=True)
        for row in self.devices:
            table.add_row(
                Text(row["device"]),
                str(row["tokens"]),
                f"{row['tokens_per_s']:.1f}",
                _number(row["acceptance"], 2),
                str(row["rounds"]),
                _number(row["mean_batch"], 1),
                f"{row['uplink_bytes_per_token']:.1f}",
                f"{row['downlink_bytes_per_token']:.1f}",
                f"{row['dsd_uplink_bytes_per_token']:,.0f}",
                row["finish"],
            )
        return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
