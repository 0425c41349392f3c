"""Fleet: how many edges and brokers, bytes and rows a second, for so many devices; each figure with its source."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fleet_cli.edge.advise.simulation.run import Outcome
from fleet_common.mqtt.packets import publish_packet_bytes
from fleet_edge.jobs import JobSettings
from schemas.codec import encode_draft, encode_verdict
from schemas.messages import Draft, Verdict
from schemas.policy import Mode

_PUBACK: Final = 4
_TOPIC: Final = "dssd/v1/fleet/device/down/verdict"
_TOKEN: Final = 20_000
_PLACE: Final = 200
_SUPPORT: Final = 12
_SPARSE_TOKEN: Final = 6
_ROWS: Final = 2  # of a session: itself, and its stay at an edge


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What cannot be measured here.

    Attributes:
        writing: Share of the devices that write at once.
        headroom: Share of what an edge holds that is planned for.
        broker_messages: That a broker passes on in a second.
        broker_connections: That a broker holds.
        trace_share: Share of the sessions whose every verdict is logged, as in the edge's settings.
        mode: Of verification.
    """

    writing: float = 0.02
    headroom: float = 0.8
    broker_messages: float = 10_000.0
    broker_connections: int = 20_000
    trace_share: float = 1.0
    mode: Mode = Mode.RESIDUAL


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one device causes while it writes, as simulated.

    Attributes:
        tokens_per_s: Committed.
        up_messages: For each token, from the device.
        down_messages: For each token, to it.
        up_bytes: For each token from the device, as MQTT packets, acknowledgements counted in.
        down_bytes: For each token to it, likewise.
        verdicts: On drafts, for each token.
        texts_per_s: That come to their end.
    """

    tokens_per_s: float
    up_messages: float
    down_messages: float
    up_bytes: float
    down_bytes: float
    verdicts: float
    texts_per_s: float


@dataclass(frozen=True, slots=True)
class Need:
    """What a fleet needs.

    Attributes:
        devices: In the fleet.
        writing: That write at once.
        edges: Like this one.
        brokers: That is, cores of brokers.
        messages_per_s: That come to the brokers.
        bytes_per_s: That come to the brokers and leave them towards devices.
        rows_per_s: New in the session log.
        updates_per_s: Of rows in the session log.
    """

    devices: int
    writing: int
    edges: int
    brokers: int
    messages_per_s: float
    bytes_per_s: float
    rows_per_s: float
    updates_per_s: float


def traffic_of(outcome: Outcome, assumptions: Assumptions) -> Traffic:
    """Return what a device causes on average, from a simulation and the sizes of the messages that it would send."""
    counts, tokens = outcome.counts, max(1, outcome.tokens)
    rejected = counts.tested - counts.accepted
    residual = assumptions.mode is Mode.RESIDUAL
    draft = _packet(encode_draft(_draft(round(outcome.mean_draft), residual=residual)))
    request = _packet(encode_draft(_draft(0, residual=residual).model_copy(update={"write": 32})))
    verdict = _packet(encode_verdict(_verdict()))
    piece_tokens = max(1, round(counts.streamed / counts.pieces)) if counts.pieces else 1
    piece = _packet(encode_verdict(_verdict(written=piece_tokens)))
    # After a rejection p goes down in residual mode: 6 bytes for each token of its support.
    beside = rejected * _SUPPORT * _SPARSE_TOKEN if residual else 0
    up = counts.drafts + counts.requests + 2 * counts.texts
    down = counts.verdicts + counts.pieces + 2 * counts.texts
    up_bytes = counts.drafts * draft + counts.requests * request + down * _PUBACK
    down_bytes = counts.verdicts * verdict + beside + counts.pieces * piece + up * _PUBACK
    rate = outcome.tokens_per_s / outcome.scenario.devices
    return Traffic(
        tokens_per_s=rate,
        up_messages=up / tokens,
        down_messages=down / tokens,
        up_bytes=up_bytes / tokens,
        down_bytes=down_bytes / tokens,
        verdicts=counts.verdicts / tokens,
        texts_per_s=rate / outcome.scenario.text_tokens,
    )


def need_of(devices: int, *, per_edge: int, traffic: Traffic, assumptions: Assumptions) -> Need:
    """Return what a fleet of so many devices needs, an edge holding `per_edge` that write at once."""
    writing = math.ceil(devices * assumptions.writing)
    planned = max(1, math.floor(per_edge * assumptions.headroom))
    tokens_per_s = writing * traffic.tokens_per_s
    messages = tokens_per_s * (traffic.up_messages + traffic.down_messages)
    rows = writing * traffic.texts_per_s * _ROWS + tokens_per_s * traffic.verdicts * assumptions.trace_share
    return Need(
        devices=devices,
        writing=writing,
        edges=math.ceil(writing / planned),
        brokers=max(
            math.ceil(messages / assumptions.broker_messages), math.ceil(devices / assumptions.broker_connections)
        ),
        messages_per_s=messages,
        bytes_per_s=tokens_per_s * (traffic.up_bytes + traffic.down_bytes),
        rows_per_s=rows,
        updates_per_s=writing / JobSettings().progress_every_s,
    )


def sources(assumptions: Assumptions, *, per_edge: int) -> Sequence[tuple[str, str]]:
    """Return of each figure where it comes from."""
    planned = max(1, math.floor(per_edge * assumptions.headroom))
    brokers = (
        f"{assumptions.broker_messages:,.0f} messages/s (--broker-messages) and {assumptions.broker_connections:,} "
        "connections (--broker-connections) for each, assumed: measure yours"
    )
    rows = (
        f"2 for each text, and {assumptions.trace_share:g} (trace_share) for each verdict on a draft; updates: the "
        f"counters of each open text every {JobSettings().progress_every_s:g} s"
    )
    return (
        ("writing at once", f"{assumptions.writing:.1%} of the devices (--writing-share, assumed)"),
        ("edges", f"{planned} each: {assumptions.headroom:.0%} (--headroom) of the {per_edge} that one holds"),
        ("brokers", brokers),
        ("messages", "as simulated, Opens and Closes counted in; each is passed on once"),
        ("bytes", "these messages encoded as they go over the wire, as MQTT packets with their acknowledgements"),
        ("rows", rows),
    )


def _packet(payload: bytes) -> int:
    return publish_packet_bytes(_TOPIC, payload, expiry=True, alias=True, topic_known=True)


def _draft(tokens: int, *, residual: bool) -> Draft:
    return Draft(
        handle=1000,
        round=_PLACE,
        epoch=_PLACE // 4,
        base=_PLACE,
        tokens=(_TOKEN,) * tokens,
        counts=(_TOKEN,) * tokens if residual else None,
        digest=(1 << 32) - 1,
    )


def _verdict(*, written: int = 0) -> Verdict:
    common = {"handle": 1000, "round": _PLACE, "queue_ms": 12.5, "compute_ms": 25.0}
    if written:
        return Verdict(accepted=0, base=_PLACE, written=(_TOKEN,) * written, **common)
    return Verdict(accepted=3, next=_TOKEN, **common)
