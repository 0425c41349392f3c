"""Advice: whether drafting pays at an edge, how many devices it serves, and what a fleet needs."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fleet_admin.planning.scenario import Plan as PlanOf
from fleet_admin.planning.scenario import PlanningError, Scenario, auto, drafting, streaming
from fleet_admin.planning.service_level import ServiceLevel
from fleet_admin.planning.simulation import SimulationResult, simulate
from fleet_common.mqtt.packets import publish_packet_bytes
from fleet_device.pacing.contract import Plan
from fleet_device.pacing.estimates import Conditions
from fleet_edge.jobs import JobSettings
from fleet_edge.session_log import SessionLog
from schemas.codec import encode_draft, encode_verdict
from schemas.errors import FleetError
from schemas.messages import Draft, Verdict
from schemas.policy import Mode

_SINCE: Final = "7d"
_SESSIONS: Final = 2000
_LEAST_TESTED: Final = 200
_LEAST_SESSIONS: Final = 5
_ROUND_TRIP_MS: Final = 20.0
_MOST_MS: Final = 60_000.0
_MOST_BYTES: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Given:
    draft_ms: float | None = None
    acceptance: float | None = None
    round_trip_ms: float | None = None
    pair: Path | None = None  # output of `fleet models check --measure --json`


@dataclass(frozen=True, slots=True)
class DraftFigures:
    draft_ms: float
    acceptance: float  # probability that a draft token is accepted if those before it are
    round_trip_ms: float
    sources: Mapping[str, str]  # origin of each of the three


def find_drafts(given: Given, *, db: str, mode: Mode) -> DraftFigures:
    """Return figures given by the user, else of the pair's measurement, else of last week's sessions."""
    _check(given)
    found: dict[str, tuple[float, str]] = {}
    if given.pair is not None:
        found["acceptance"] = (_of_pair(given.pair, mode), f"{mode.value} acceptance in {given.pair}")
    flags = (("draft_ms", given.draft_ms), ("acceptance", given.acceptance), ("round_trip_ms", given.round_trip_ms))
    found |= {name: (value, "as given") for name, value in flags if value is not None}
    reason = ""
    if len(found) < len(flags):
        try:
            found = _of_log(db) | found
        except FleetError as error:
            reason = f" ({error})"
    found.setdefault("round_trip_ms", (_ROUND_TRIP_MS, "assumed; give --rtt-ms"))
    for name, flag in (("draft_ms", "--draft-ms"), ("acceptance", "--acceptance")):
        if name not in found:
            raise PlanningError(
                f"It is not known how devices draft: give {flag}, or with --db a session log in which devices have "
                f"drafted within the last week{reason}."
            )
    return DraftFigures(
        draft_ms=found["draft_ms"][0],
        acceptance=found["acceptance"][0],
        round_trip_ms=found["round_trip_ms"][0],
        sources={name: source for name, (_, source) in found.items()},
    )


def _check(given: Given) -> None:
    for flag, value in (("--draft-ms", given.draft_ms), ("--rtt-ms", given.round_trip_ms)):
        if value is not None and not 0.0 <= value <= _MOST_MS:
            raise PlanningError(f"{flag} is {value:g}; give milliseconds, from 0 to {_MOST_MS:,.0f}.")
    if given.acceptance is not None and not 0.0 <= given.acceptance <= 1.0:
        raise PlanningError(
            f"--acceptance is {given.acceptance:g}; give the share of draft tokens that is accepted, from 0 to 1."
        )


def _of_pair(path: Path, mode: Mode) -> float:
    try:
        with path.open("rb") as file:
            content: Any = json.loads(file.read(_MOST_BYTES))
        value = content["measured"][mode.value]["acceptance"]
    except OSError as error:
        raise PlanningError(f"{path} cannot be read: {error.strerror or error}; correct --pair.") from error
    except (ValueError, KeyError, TypeError):
        value = None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 <= value <= 1.0:
        raise PlanningError(
            f"{path} holds no measured acceptance; write it with `fleet models check DRAFT TARGET --measure --json`."
        )
    return float(value)


def _of_log(db: str) -> dict[str, tuple[float, str]]:
    """Return the figures that devices reported in the last week."""
    with SessionLog(db) as log:
        sessions = log.sessions(since=_SINCE, limit=_SESSIONS)
    closed = [each for each in sessions if each.device_drafted is not None]
    drafted = sum(each.device_drafted or 0 for each in closed)
    tested = sum(each.device_tested or 0 for each in closed)
    said = f"the last {len(closed)} sessions of a week in the session log"
    found: dict[str, tuple[float, str]] = {}
    if tested >= _LEAST_TESTED:
        found["acceptance"] = (sum(each.device_accepted or 0 for each in closed) / tested, said)
        found["draft_ms"] = (sum(each.device_draft_ms or 0.0 for each in closed) / drafted, said)
    # Edge-only devices wait all the time; the others once for each verdict and once for the Open.
    waiting = [each for each in closed if not each.counted.streamed and each.network_ms is not None]
    rounds = sum((each.device_rounds or 0) + 1 for each in waiting)
    if len(waiting) >= _LEAST_SESSIONS:
        found["round_trip_ms"] = (sum(each.network_ms or 0.0 for each in waiting) / rounds, said)
    return found


_WORTH: Final = 1.05
"""Drafting pays if it is this many times as fast as edge-only decoding: a model on the device has a cost."""

_MOST_DEVICES: Final = 1 << 14
_PRECISION: Final = 0.05
_INSTANT_S: Final = 1e-6
_MOST_ACCEPTANCE: Final = 0.995


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """Median tokens/s of a device while `devices` generate."""

    devices: int
    streaming: float  # edge-only decoding
    drafting: float  # the best fixed plan
    plan: Plan  # that plan
    chosen: float  # devices choose their plan
    busy: float  # share of the time in which the edge computes, where devices choose


@dataclass(frozen=True, slots=True)
class EdgeCapacity:
    """Number of devices that get a service level."""

    devices: int  # most that generate at once
    measured: bool  # whether the curve covers that many; else it is extrapolated
    outcome: SimulationResult | None  # of the simulation of that many


@dataclass(frozen=True, slots=True)
class EdgeFindings:
    streamed: float  # tokens/s of one device with edge-only decoding
    plans: dict[Plan, float]  # tokens/s of one device
    best: Plan
    loads: Sequence[LoadPoint]  # by rising number of devices
    pays_up_to: int  # devices up to which drafting pays; 0 if it never does
    holds: EdgeCapacity  # where devices choose
    holds_streaming: EdgeCapacity  # with edge-only decoding

    @property
    def pays(self) -> bool:
        return self.plans[self.best] >= _WORTH * self.streamed


def conditions_of(scenario: Scenario, *, devices: int, tokens: int) -> Conditions:
    return Conditions(
        acceptance=min(_MOST_ACCEPTANCE, scenario.acceptance),
        token_s=scenario.draft_s,
        beside_s=max(_INSTANT_S, scenario.round_trip_s + 2 * scenario.message_s),
        compute_s=scenario.curve.step_ms(devices, tokens + 1) / 1e3,
        window=scenario.limits.window,
    )


def promised(scenario: Scenario, *, devices: int) -> dict[Plan, float]:
    """Return the tokens/s of each plan, by the formula of the devices' pacing."""
    lengths = range(1, scenario.limits.max_draft + 1)
    plans = [Plan(tokens, ahead) for ahead in (False, True) for tokens in lengths]
    return {plan: conditions_of(scenario, devices=devices, tokens=plan.tokens).rate(plan) for plan in plans}


def find(
    scenario: Scenario, level: ServiceLevel, *, share: float, on_progress: Callable[[str], None] = lambda _said: None
) -> EdgeFindings:
    """Measure an edge by simulation; `share` of the devices must get the service level."""
    plans = promised(scenario, devices=1)
    best = max(plans, key=plans.__getitem__)
    on_progress("devices that choose")
    holds = find_capacity(replace(scenario, plan=auto), level, share=share)
    on_progress("devices that have the edge write")
    holds_streaming = find_capacity(replace(scenario, plan=streaming), level, share=share)
    loads = []
    for devices in _loads(max(holds.devices, holds_streaming.devices, 1)):
        on_progress(f"{devices} devices under each plan")
        loads.append(_load(scenario, devices))
    paying = [load.devices for load in loads if load.drafting >= _WORTH * load.streaming]
    return EdgeFindings(
        streamed=1.0 / (scenario.curve.step_ms(1, 1) / 1e3 + scenario.message_s),
        plans=plans,
        best=best,
        loads=loads,
        pays_up_to=max(paying, default=0),
        holds=holds,
        holds_streaming=holds_streaming,
    )


def find_capacity(scenario: Scenario, level: ServiceLevel, *, share: float) -> EdgeCapacity:
    """Return how many devices get a service level, to within some percent."""
    outcomes: dict[int, SimulationResult] = {}

    def holds(devices: int) -> bool:
        outcomes[devices] = outcome = simulate(replace(scenario, devices=devices))
        return outcome.at_level(level) >= share * devices

    good, bad = 0, 1
    while bad <= _MOST_DEVICES and holds(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(1, int(_PRECISION * good)):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return EdgeCapacity(good, good <= scenario.curve.most_sessions, outcomes.get(good))


def _loads(most: int) -> list[int]:
    """Return powers of two, the last of which is at least `most`."""
    return [1 << power for power in range((most - 1).bit_length() + 1)]


def _load(scenario: Scenario, devices: int) -> LoadPoint:
    plans = promised(scenario, devices=devices)
    tried = [max((plan for plan in plans if plan.ahead is ahead), key=plans.__getitem__) for ahead in (False, True)]

    def run(plan: PlanOf) -> SimulationResult:
        return simulate(replace(scenario, devices=devices, plan=plan))

    drafted = {plan: run(drafting(plan.tokens, ahead=plan.ahead)).pace for plan in tried}
    best = max(drafted, key=drafted.__getitem__)
    chosen = run(auto)
    return LoadPoint(devices, run(streaming).pace, drafted[best], best, chosen.pace, chosen.busy)


_PUBACK: Final = 4
_TOPIC: Final = "dssd/v1/fleet/device/down/verdict"
_TOKEN: Final = 20_000
_PLACE: Final = 200
_SUPPORT: Final = 12
_SPARSE_TOKEN: Final = 6
_ROWS: Final = 2  # of a session: itself, and its stay at an edge


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Figures that cannot be measured here."""

    writing: float = 0.02  # share of the devices that generate at once
    headroom: float = 0.8  # share of an edge's capacity that is planned for
    broker_messages: float = 10_000.0  # per second and broker
    broker_connections: int = 20_000  # per broker
    trace_share: float = 1.0  # share of the sessions whose verdicts are logged
    mode: Mode = Mode.RESIDUAL


@dataclass(frozen=True, slots=True)
class DeviceTraffic:
    tokens_per_s: float
    up_messages: float  # per token
    down_messages: float  # per token
    up_bytes: float  # per token, as MQTT packets with acknowledgements
    down_bytes: float  # per token
    verdicts: float  # per token
    texts_per_s: float  # requests that end


@dataclass(frozen=True, slots=True)
class FleetNeed:
    devices: int
    writing: int  # that generate at once
    edges: int
    brokers: int  # cores of brokers
    messages_per_s: float  # to the brokers
    bytes_per_s: float  # to the brokers and from them to devices
    rows_per_s: float  # new in the session log
    updates_per_s: float  # of rows in the session log


def traffic_of(outcome: SimulationResult, assumptions: Assumptions) -> DeviceTraffic:
    """Return a device's mean traffic, from a simulation and the sizes of real messages."""
    counts, tokens = outcome.counts, max(1, outcome.tokens)
    rejected = counts.tested - counts.accepted
    residual = assumptions.mode is Mode.RESIDUAL
    draft = _packet(encode_draft(_draft(round(outcome.mean_draft), residual=residual)))
    request = _packet(encode_draft(_draft(0, residual=residual).model_copy(update={"write": 32})))
    verdict = _packet(encode_verdict(_verdict()))
    piece_tokens = max(1, round(counts.streamed / counts.pieces)) if counts.pieces else 1
    piece = _packet(encode_verdict(_verdict(written=piece_tokens)))
    # After a rejection in residual mode the edge sends p: 6 bytes for each token of its support.
    residual_bytes = rejected * _SUPPORT * _SPARSE_TOKEN if residual else 0
    up = counts.drafts + counts.requests + 2 * counts.texts
    down = counts.verdicts + counts.pieces + 2 * counts.texts
    up_bytes = counts.drafts * draft + counts.requests * request + down * _PUBACK
    down_bytes = counts.verdicts * verdict + residual_bytes + counts.pieces * piece + up * _PUBACK
    rate = outcome.tokens_per_s / outcome.scenario.devices
    return DeviceTraffic(
        tokens_per_s=rate,
        up_messages=up / tokens,
        down_messages=down / tokens,
        up_bytes=up_bytes / tokens,
        down_bytes=down_bytes / tokens,
        verdicts=counts.verdicts / tokens,
        texts_per_s=rate / outcome.scenario.text_tokens,
    )


def need_of(devices: int, *, per_edge: int, traffic: DeviceTraffic, assumptions: Assumptions) -> FleetNeed:
    """Return a fleet's needs if an edge serves `per_edge` generating devices."""
    writing = math.ceil(devices * assumptions.writing)
    planned = max(1, math.floor(per_edge * assumptions.headroom))
    tokens_per_s = writing * traffic.tokens_per_s
    messages = tokens_per_s * (traffic.up_messages + traffic.down_messages)
    rows = writing * traffic.texts_per_s * _ROWS + tokens_per_s * traffic.verdicts * assumptions.trace_share
    return FleetNeed(
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
