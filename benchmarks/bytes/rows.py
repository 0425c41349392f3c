"""Rows: what one system has sent for each token, in the columns that all benchmarks share and in its own."""

import argparse
from dataclasses import asdict, dataclass
from typing import Any, Self

from benchmarks.bytes.counting import Traffic
from benchmarks.bytes.variants import Variant

__all__ = ["Row"]


@dataclass(frozen=True, slots=True)
class Row:
    """Bytes for each committed token, up from the device and down to it; the opening of sessions is left out.

    Attributes:
        system: Its name.
        mode: Of verification.
        draft: The draft model's.
        draft_length: Tokens of a draft; None where there are no drafts, or the device chooses.
        stops: Whether drafts end where the draft model is unsure; `draft_length` is the most then.
        cost: Of the target; its messages are the same at any.
        devices: That write at the same time.
        rtt_ms: There and back, where times matter.
        tokens: Of all texts.
        acceptance: Accepted of tested draft tokens; None without any.
        uplink_bytes_per_token: Payload.
        downlink_bytes_per_token: Payload.
        uplink_packet_bytes_per_token: MQTT packets, acknowledgements of the other way among them.
        downlink_packet_bytes_per_token: Likewise.
        uplink_tls_bytes_per_token: The same over TLS 1.3.
        downlink_tls_bytes_per_token: Likewise.
        uplink_wire_bytes_per_token: And with the heads of TCP and IP.
        downlink_wire_bytes_per_token: Likewise.
    """

    system: str
    mode: str
    draft: str
    draft_length: int | None
    stops: bool
    cost: int
    devices: int
    rtt_ms: float
    tokens: int
    acceptance: float | None
    uplink_bytes_per_token: float = 0.0
    downlink_bytes_per_token: float = 0.0
    uplink_packet_bytes_per_token: float = 0.0
    downlink_packet_bytes_per_token: float = 0.0
    uplink_tls_bytes_per_token: float = 0.0
    downlink_tls_bytes_per_token: float = 0.0
    uplink_wire_bytes_per_token: float = 0.0
    downlink_wire_bytes_per_token: float = 0.0

    @classmethod
    def of(cls, variant: Variant, draft: str, arguments: argparse.Namespace, plain: Traffic, tls: Traffic) -> Self:
        """Make a row of what was counted without TLS and with it."""
        tokens, with_tls = max(1, plain.tokens), max(1, tls.tokens)
        return cls(
            variant.system,
            variant.mode.value,
            draft,
            variant.length,
            variant.stops,
            cost=1,
            devices=1,
            rtt_ms=arguments.round_trip,
            tokens=plain.tokens,
            acceptance=plain.accepted / plain.tested if plain.tested else None,
            uplink_bytes_per_token=plain.up / tokens,
            downlink_bytes_per_token=plain.down / tokens,
            uplink_packet_bytes_per_token=plain.packets_up / tokens,
            downlink_packet_bytes_per_token=plain.packets_down / tokens,
            uplink_tls_bytes_per_token=tls.packets_up / with_tls,
            downlink_tls_bytes_per_token=tls.packets_down / with_tls,
            uplink_wire_bytes_per_token=tls.wire_up / with_tls,
            downlink_wire_bytes_per_token=tls.wire_down / with_tls,
        )

    @property
    def both_ways(self) -> float:
        """Payload up and down."""
        return self.uplink_bytes_per_token + self.downlink_bytes_per_token

    @property
    def line(self) -> str:
        """For a table."""
        length = "" if self.draft_length is None else f" {self.draft_length}{' at most' * self.stops}"
        figures = [
            (self.uplink_bytes_per_token, self.downlink_bytes_per_token),
            (self.uplink_packet_bytes_per_token, self.downlink_packet_bytes_per_token),
            (self.uplink_tls_bytes_per_token, self.downlink_tls_bytes_per_token),
            (self.uplink_wire_bytes_per_token, self.downlink_wire_bytes_per_token),
        ]
        accepted = "" if self.acceptance is None else f"{self.acceptance:10.2f}"
        label = f"  {self.system} {self.mode}{length}"
        return f"{label:<42}" + "".join(f"{up:12,.1f} {down:9,.1f}" for up, down in figures) + accepted

    def json(self) -> dict[str, Any]:
        """Return it as JSON values. Speeds are other benchmarks' to tell."""
        return {**asdict(self), "mbit_s": None, "tokens_per_s": None, "ttft_ms": None}
