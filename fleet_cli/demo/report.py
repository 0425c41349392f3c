"""Report of the demo: a table for the reader, JSON for programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from fleet_cli.tables import Column, table_lines

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
        return {
            "broker": self.broker,
            "mode": self.mode,
            "draft": self.draft,
            "target": self.target,
            "wall_s": round(self.wall_s, 3),
            "devices": list(self.devices),
        }

    def lines(self, width: int | None) -> list[str]:
        """Return it for people.

        Args:
            width: Of the terminal; None where there is none.
        """
        tokens = sum(row["tokens"] for row in self.devices)
        return [
            f"{self.mode} mode, draft {self.draft}, target {self.target}, over {self.broker}",
            *table_lines(_COLUMNS, self.devices, width=width),
            f"{tokens} tokens in {self.wall_s:.1f} s. Bytes are payload.",
            "* computed: what shipping the draft model's full distributions up would have cost.",
        ]


_COLUMNS: Final[list[Column[dict[str, Any]]]] = [
    Column("device", lambda row: row["device"], rank=0),
    Column("tokens", lambda row: row["tokens"], "count", rank=0),
    Column("tokens/s", lambda row: row["tokens_per_s"], "figure"),
    Column("acceptance", lambda row: row["acceptance"], "percent"),
    Column("rounds", lambda row: row["rounds"], "count", rank=2),
    Column("mean batch", lambda row: row["mean_batch"], "figure"),
    Column("up per token", lambda row: row["uplink_bytes_per_token"], "bytes"),
    Column("down per token", lambda row: row["downlink_bytes_per_token"], "bytes"),
    Column("DSD up per token*", lambda row: row["dsd_uplink_bytes_per_token"], "bytes"),
    Column("end", lambda row: row["finish"], "state"),
]
