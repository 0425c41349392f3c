"""Bytes: what each system sends for a token of text, each way: payload, MQTT packets, over TLS, over TCP/IP.

Real devices, a real edge but for its models, a real mosquitto, with certificates and without. What target and draft
model say along some texts is recorded once and served again by position: drafts are accepted as often as the models'
own, all systems write behind the same prompts with the same seeds, and no model is needed at run time. A relay counts
what the device's connection carries, from the first draft of a text to its last verdict. TLS is the same once more
over TLS. TCP and IP are computed: 52 bytes for each segment that the kernel has counted, and full distributions up:
two bytes a probability of each drafted token. Takes 6 minutes with `--outputs 4 --tokens 48 --lengths 4 8 16`.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from math import prod
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import (
    Bench,
    BenchGoal,
    SuiteReport,
    at_least,
    at_most,
    edge_only_pacing,
    number_of,
    say,
    table,
    tls_broker,
)
from benchmarks.recordings import RecordedLaws, record_laws
from benchmarks.systems import DRAFT
from fleet_admin.models.prompts import built_in, some
from fleet_common.mqtt.link import Handler, Message
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.client.agent import Agent
from fleet_device.drafters.without_model import WordCodec
from fleet_device.pacing.contract import FixedPacing, Pacing, Plan
from fleet_device.requests.generate import GenerateRequest
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import Item
from sampling.downlink import FormName
from schemas.policy import Mode
from schemas.topics import Topic
from schemas.vocabulary import Vocabulary
from tests.support.edge_thread import NO_QUOTAS, edge_thread
from tests.support.recorded_drafter import RecordedDrafter, RecordedText
from tests.support.relay import Relay
from tests.support.scripted_verifier import ScriptedVerifier

_EDGE, _DEVICE = "edge-1", "device-1"
_HANDLE: Final = 40_000
"""The first handle: three bytes in each message, as 99 of 100 handles."""

TCP_IP_HEAD: Final = 52
"""Header bytes of each segment: IPv4 20, TCP 20, its time stamps 12."""

_SEGMENT: Final = 1448  # payload of a segment on Ethernet; on loopback one holds 64 KiB
_ACKNOWLEDGED: Final = 2  # full segments that one acknowledgement answers
_START_S: Final = 20.0
_QUIET_S: Final = 0.06  # longer than a delayed acknowledgement of TCP waits
_WARM_UP_TOKENS: Final = 8
_WORTH: Final = 1 / 6
"""Two uplink bytes of the twelve that a committed token costs both ways."""

_STEP_S, _ROUND_TRIP_S = 0.03, 0.02  # of edge-only decoding, whose messages depend on times
_LENGTHS: Final = (2, 4, 8, 16)
_HALF: Final = 2
"""Bytes of a probability in full distributions: half precision, the least in any publication."""

_UPLINK, _DOWNLINK, _BOTH_WAYS = 10_000, 200, 12.0
"""Goals: an uplink of full distributions over ours, the dense downlink over ours, bytes a token of coupled mode."""


@dataclass(frozen=True, slots=True)
class SavingPacing(FixedPacing):
    """Drafts while the whole draft is accepted with probability `_WORTH`, to send as few bytes as possible.

    It uses the probabilities with which the tokens were drawn: drawn tokens are sent.
    """

    def plan(self, *, longest: int, window: int) -> Plan:
        del longest, window
        return Plan(self.tokens, may_stop=True)

    def goes_on(self, chances: Sequence[float]) -> bool:
        return prod(chances) >= _WORTH


@dataclass(frozen=True, slots=True)
class WireVariant:
    system: str
    mode: Mode
    length: int | None = None
    form: FormName = FormName.AUTO
    stops: bool = False

    @property
    def name(self) -> str:
        length = "" if self.length is None else f" {self.length}{' at most' * self.stops}"
        return f"{self.system} {self.mode.value}{length}"

    def pacing(self) -> Pacing:
        if self.stops:
            return SavingPacing(self.length or 0)
        if self.length is not None:
            return FixedPacing(self.length)
        return edge_only_pacing()


def variants(lengths: Sequence[int] = _LENGTHS) -> Iterator[WireVariant]:
    """Yield all variants; drafts have `DRAFT` tokens where only one length is measured."""
    yield WireVariant("dssd-dense", Mode.RESIDUAL, DRAFT, form=FormName.DENSE)
    for mode in Mode:
        yield WireVariant("edge-only", mode)
        for length in lengths:
            yield WireVariant(f"ours-{mode.value}", mode, length)
        yield WireVariant(f"ours-{mode.value}", mode, max(lengths), stops=True)


class _SlowVerifier(ScriptedVerifier):
    step_s = 0.0

    def score(self, items: Sequence[Item]) -> NDArray[np.float32]:
        time.sleep(self.step_s)
        return super().score(items)


@dataclass(slots=True)
class Traffic:
    """Tokens, then bytes of payload and of packets (over TLS its records), and TCP segments.

    `session` is the payload of the messages that open and close the sessions of the requests.
    """

    tokens: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    up: int = 0
    down: int = 0
    packets_up: int = 0
    packets_down: int = 0
    segments_up: int = 0
    segments_down: int = 0
    session: int = 0
    requests: int = 0

    def add(self, other: "Traffic") -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def wire_up(self) -> int:
        """Return the device's bytes with TCP and IP headers; long packets are cut as on Ethernet."""
        return self.packets_up + TCP_IP_HEAD * _segments(self.segments_up, self.packets_up, self.packets_down)

    @property
    def wire_down(self) -> int:
        return self.packets_down + TCP_IP_HEAD * _segments(self.segments_down, self.packets_down, self.packets_up)


def _segments(counted: int, sent: int, received: int) -> int:
    return max(counted, sent // _SEGMENT + received // _SEGMENT // _ACKNOWLEDGED)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--drafts", nargs="+", default=["Q4_0", "Q4_1"], help="quantizations (default: %(default)s)")
    parser.add_argument("--lengths", nargs="+", type=int, default=_LENGTHS, metavar="N", help="of our drafts")
    parser.add_argument("--outputs", type=number_of(int, 1), default=6, help="of each system (default: %(default)s)")
    parser.add_argument("--tokens", type=number_of(int, 2), default=64, help="of each text, at most")


def run(bench: Bench) -> SuiteReport:
    rows: list[dict[str, Any]] = []
    for draft in bench.options.drafts:
        rows += _measure(bench, draft)
    return SuiteReport(rows, goals(rows))


def _measure(bench: Bench, draft: str) -> list[dict[str, Any]]:
    options = bench.options
    prompts = some(built_in(), -(-options.outputs // 6))
    laws = record_laws(bench, draft, prompts, tokens=options.tokens)
    kinds = {variant: {"plain": Traffic(), "tls": Traffic()} for variant in variants(options.lengths)}
    with (
        bench.broker(_EDGE) as plain,
        tls_broker(bench.new_folder() / "broker", bench.fleet, [_EDGE], [_DEVICE]) as local,
    ):

        def with_tls(name: str) -> BrokerSettings:
            files = local.identity(name)
            return BrokerSettings(port=local.port, ca=files.ca, certificate=files.certificate, key=files.key)

        without = BrokerSettings(port=plain.port)
        places = {"plain": (without, without), "tls": (with_tls(_DEVICE), with_tls(_EDGE))}
        for kind, (device, edge) in places.items():
            for form in (FormName.AUTO, FormName.DENSE):
                found = {variant: counted[kind] for variant, counted in kinds.items() if variant.form is form}
                _count(bench, laws, device, edge, form, found)
    rows = [
        _row(variant, draft, counted["plain"], counted["tls"], len(laws.words)) for variant, counted in kinds.items()
    ]
    columns = {"variant": "", "session_bytes": ",.0f"}
    for kind in ("", "packet_", "tls_", "wire_"):
        columns |= {f"up_{kind}bytes": ",.1f", f"down_{kind}bytes": ",.1f"}
    title = (
        f"draft {draft}, bytes of a session's messages, and bytes a token: payload, MQTT packets, over TLS, and TCP/IP"
    )
    shown = [
        {
            key.replace("link_", "_").replace("_per_token", "").replace("_per_request", ""): value
            for key, value in row.items()
        }
        for row in rows
    ]
    table(shown, columns | {"acceptance": ".2f"}, title=title)
    return rows


def _row(variant: WireVariant, draft: str, plain: Traffic, tls: Traffic, vocabulary: int) -> dict[str, Any]:
    tokens, with_tls = max(1, plain.tokens), max(1, tls.tokens)
    return {
        "variant": variant.name,
        "system": variant.system,
        "mode": variant.mode.value,
        "draft": draft,
        "draft_length": variant.length,
        "stops": variant.stops,
        "tokens": plain.tokens,
        "acceptance": plain.accepted / plain.tested if plain.tested else None,
        "uplink_bytes_per_token": plain.up / tokens,
        "full_uplink_bytes_per_token": plain.drafted * vocabulary * _HALF / tokens,
        "downlink_bytes_per_token": plain.down / tokens,
        "session_bytes_per_request": plain.session / max(1, plain.requests),
        "uplink_packet_bytes_per_token": plain.packets_up / tokens,
        "downlink_packet_bytes_per_token": plain.packets_down / tokens,
        "uplink_tls_bytes_per_token": tls.packets_up / with_tls,
        "downlink_tls_bytes_per_token": tls.packets_down / with_tls,
        "uplink_wire_bytes_per_token": tls.wire_up / with_tls,
        "downlink_wire_bytes_per_token": tls.wire_down / with_tls,
    }


def goals(rows: Sequence[dict[str, Any]]) -> list[BenchGoal]:
    found = []
    for draft in dict.fromkeys(row["draft"] for row in rows):
        mine = [row for row in rows if row["draft"] == draft]
        fixed = {row["system"]: row for row in mine if row["draft_length"] == DRAFT and not row["stops"]}
        for system in (name for name in ("ours-residual", "ours-coupled") if name in fixed):
            ratio = fixed[system]["full_uplink_bytes_per_token"] / fixed[system]["uplink_bytes_per_token"]
            found.append(at_least(f"{draft}: an uplink of full distributions over that of {system}", ratio, _UPLINK))
        if {"dssd-dense", "ours-residual"} <= set(fixed):
            dense, ours = (fixed[name]["downlink_bytes_per_token"] for name in ("dssd-dense", "ours-residual"))
            found.append(at_least(f"{draft}: the dense downlink over that of ours-residual", dense / ours, _DOWNLINK))
        coupled = [row for row in mine if row["system"] == "ours-coupled"]
        if coupled:
            best = min(coupled, key=_both_ways)
            what = f"{draft}: payload both ways of {best['variant']}, bytes a token"
            found.append(at_most(what, _both_ways(best), _BOTH_WAYS))
    return found


def _both_ways(row: dict[str, Any]) -> float:
    return float(row["uplink_bytes_per_token"] + row["downlink_bytes_per_token"])


def _count(
    bench: Bench,
    laws: RecordedLaws,
    device: BrokerSettings,
    edge: BrokerSettings,
    form: FormName,
    found: dict[WireVariant, Traffic],
) -> None:
    options, chosen, words = bench.options, laws.laws[: bench.options.outputs], laws.words
    verifier = _SlowVerifier(laws, words, name="recorded")
    settings = EdgeSettings(fleet=bench.fleet, edge=_EDGE, broker=edge, form=form, quotas=NO_QUOTAS)
    with edge_thread(settings, verifier, first_handle=_HANDLE):
        for variant, total in found.items():
            timed = variant.system == "edge-only"
            verifier.step_s = _STEP_S * timed
            say(variant.name)
            with _CountingDevice(device, bench.fleet, variant, words, round_trip_s=_ROUND_TRIP_S * timed) as writer:
                writer.write(chosen[0].text(options.outputs, variant.mode), tokens=_WARM_UP_TOKENS)  # sets the aliases
                for seed, law in enumerate(chosen):
                    total.add(writer.write(law.text(seed, variant.mode)))


def _settled(relay: Relay) -> tuple[int, ...]:
    """Return a relay's bytes and segments up and down, once nothing moves any more."""
    before: tuple[int, ...] = ()
    while (now := (relay.up, relay.down, *relay.segments)) != before:
        before = now
        time.sleep(_QUIET_S + relay.round_trip_s)
    return now


class _CountingLink:
    """Marks when a request's first draft is sent and when it is closed; counts what opens and closes its session."""

    def __init__(self, link: PahoLink, relay: Relay) -> None:
        self._link, self._relay = link, relay
        self._began: tuple[int, ...] | None = None
        self.counted: tuple[int, ...] = (0, 0, 0, 0)
        self.session = 0

    def publish(self, topic: str, payload: bytes, **options: Any) -> None:  # noqa: ANN401 - passed on
        if f"/{Topic.DRAFT.value}" in topic and self._began is None:
            self._began = _settled(self._relay)
        elif topic.endswith(Topic.CLOSE.value) and self._began is not None:
            ended = _settled(self._relay)
            self.counted = tuple(now - then for now, then in zip(ended, self._began, strict=True))
            self._began = None
        if topic.endswith((Topic.OPEN.value, Topic.CLOSE.value)):
            self.session += len(payload)
        self._link.publish(topic, payload, **options)

    def subscribe(self, topic: str, handler: Handler, **options: Any) -> None:  # noqa: ANN401 - passed on
        def take(message: Message) -> None:
            if message.topic.endswith(Topic.SESSION.value):
                self.session += len(message.payload)
            handler(message)

        self._link.subscribe(topic, take, **options)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - all else is the link's
        return getattr(self._link, name)


class _CountingDevice(AbstractContextManager["_CountingDevice"]):
    """A real device that replays records, on a connection whose bytes are counted."""

    def __init__(
        self, broker: BrokerSettings, fleet: str, variant: WireVariant, words: tuple[str, ...], *, round_trip_s: float
    ) -> None:
        self._relay = Relay(broker.port, round_trip_s=round_trip_s)
        self._link = PahoLink(broker.model_copy(update={"port": self._relay.port}).link(fleet, _DEVICE, will=None))
        self._counting = _CountingLink(self._link, self._relay)
        self._drafter = RecordedDrafter(WordCodec(words), Vocabulary.of(words), token_s=0.0)
        counting: Any = self._counting
        self._agent = Agent(counting, fleet, _DEVICE, self._drafter, variant.pacing(), time.monotonic)
        self._agent.attach()

    def __enter__(self) -> Self:
        self._link.start(timeout_s=_START_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.stop()
        self._relay.close()

    def write(self, text: RecordedText, *, tokens: int | None = None) -> Traffic:
        self._drafter.play(text)
        self._counting.session = 0
        done = self._agent.generate(
            GenerateRequest(tuple(text.prompt), policy=text.policy, max_new_tokens=tokens or len(text.tokens))
        )
        of = done.counters
        sizes = (of.drafted, of.tested, of.accepted, of.uplink_bytes, of.downlink_bytes, *self._counting.counted)
        return replace(Traffic(len(done.tokens), *sizes), session=self._counting.session, requests=1)
