"""Bytes: what each system sends for a token of text, each way: payload, MQTT packets, over TLS, over TCP/IP.

Real devices, a real edge but for its models, a real mosquitto, with certificates and without. What target and draft
model say along some texts is recorded once and served again by position: drafts are accepted as often as the models'
own, all systems write behind the same prompts with the same seeds, and no model is needed at run time. A relay counts
what the device's connection carries, from the first draft of a text to its last verdict. TLS is the same once more
over TLS. TCP and IP are computed: 52 bytes for each segment that the kernel has counted. Full distributions up are
filling of the same size, two bytes a probability. Takes 6 minutes with `--texts 4 --tokens 48 --lengths 4 8 16`.
"""

import argparse
import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from math import prod
from types import TracebackType
from typing import Any, Final, Self

from benchmarks.harness import Bench, Goal, Report, at_least, at_most, number_of, say, streaming, table, tls_broker
from benchmarks.metered_edge import MeteredVerifier
from benchmarks.recordings import RecordedLaw, RecordedLaws, record_laws
from benchmarks.systems import CO_LOCATED, DEVICE_ALONE, DRAFT, HALF, FillingLink
from dssd.downlink import FormName
from dssd.sampling import coupled_token
from fleet_admin.models.prompts import built_in, some
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.client.agent import Agent
from fleet_device.drafters.without_model import WordCodec
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import STREAMED, FixedPacing, Pacing, Plan
from fleet_device.requests.generate import GenerateRequest
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.scripted import ScriptedVerifier
from schemas.codec import encode_draft, encode_verdict
from schemas.messages import Draft, Verdict
from schemas.policy import Mode
from schemas.topics import TREE, Topic, build, wildcard
from schemas.vocabulary import Vocabulary
from tests.support.edge_thread import NO_QUOTAS, edge_thread
from tests.support.recorded_drafter import RecordedDrafter, RecordedText
from tests.support.relay import Relay

_EDGE, _DEVICE = "edge-1", "device-1"
_HANDLE: Final = 40_000
"""The first handle: three bytes in each message, as 99 of 100 handles."""

TCP_IP_HEAD: Final = 52
"""Header bytes of each segment: IPv4 20, TCP 20, its time stamps 12."""

_SEGMENT: Final = 1448  # payload of a segment on Ethernet; on loopback one holds 64 KiB
_ACKNOWLEDGED: Final = 2  # full segments that one acknowledgement answers
_START_S, _TIMEOUT_S = 20.0, 20.0
_QUIET_S: Final = 0.06  # longer than a delayed acknowledgement of TCP waits
_WARM_UP_TOKENS: Final = 8
_EXPIRY_S: Final = next(rule.expiry_s for rule in TREE if rule.topic is Topic.VERDICT)
_COMPUTE_MS: Final = 31.5  # any: a time takes three bytes
_WORTH: Final = 1 / 6
"""Two uplink bytes of the twelve that a committed token costs both ways."""

_LENGTHS: Final = (2, 4, 8, 16)
_TIMED: Final = ("edge-streaming", "ours-ahead", "ours-auto")
"""Systems whose messages depend on timing."""

_UPLINK, _DOWNLINK, _BOTH_WAYS = 10_000, 200, 12.0
"""Goals: DSD's uplink over ours, the dense downlink over ours, payload bytes a token of coupled mode."""


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
class Variant:
    system: str
    mode: Mode
    length: int | None = None
    form: FormName = FormName.AUTO
    ahead: bool = False
    full_up: bool = False
    stops: bool = False

    @property
    def local(self) -> bool:
        return self.system in {DEVICE_ALONE, CO_LOCATED}

    @property
    def name(self) -> str:
        length = "" if self.length is None else f" {self.length}{' at most' * self.stops}"
        return f"{self.system} {self.mode.value}{length}"

    def pacing(self) -> Pacing:
        if self.stops:
            return SavingPacing(self.length or 0)
        if self.length is not None:
            return FixedPacing(self.length, ahead=self.ahead)
        return streaming() if self.system == "edge-streaming" else AdaptivePacing(stream=None)


def variants(lengths: Sequence[int] = _LENGTHS) -> Iterator[Variant]:
    """Yield all variants; drafts have `DRAFT` tokens where only one length is measured."""
    yield Variant(DEVICE_ALONE, Mode.COUPLED)
    yield Variant(CO_LOCATED, Mode.COUPLED, DRAFT)
    yield Variant("dsd", Mode.RESIDUAL, DRAFT, full_up=True)
    yield Variant("dssd-dense", Mode.RESIDUAL, DRAFT, form=FormName.DENSE)
    for mode in Mode:
        yield Variant("edge-streaming", mode)
        for length in lengths:
            yield Variant(f"ours-{mode.value}", mode, length)
        yield Variant(f"ours-{mode.value}", mode, max(lengths), stops=True)
        yield Variant("ours-ahead", mode, DRAFT, ahead=True)
        yield Variant("ours-auto", mode)


@dataclass(slots=True)
class Traffic:
    """Tokens, then bytes of payload and of packets (over TLS its records), and TCP segments."""

    tokens: int = 0
    tested: int = 0
    accepted: int = 0
    up: int = 0
    down: int = 0
    packets_up: int = 0
    packets_down: int = 0
    segments_up: int = 0
    segments_down: int = 0

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
    parser.add_argument("--texts", type=number_of(int, 1), default=6, help="of each system (default: %(default)s)")
    parser.add_argument("--tokens", type=number_of(int, 2), default=64, help="of each text, at most")
    parser.add_argument("--round-trip", type=float, default=20.0, metavar="MS", help="where times matter")
    parser.add_argument("--step-ms", type=float, default=30.0, help="of the edge, where times matter")
    parser.add_argument("--token-ms", type=float, default=10.0, help="of the draft model, likewise")


def run(bench: Bench) -> Report:
    rows: list[dict[str, Any]] = []
    for draft in bench.options.drafts:
        rows += _measure(bench, draft)
    return Report(rows, goals(rows), draw=lambda figure: _draw(figure, rows))


def _measure(bench: Bench, draft: str) -> list[dict[str, Any]]:
    options = bench.options
    prompts = some(built_in(), -(-options.texts // 6))
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
    rows = [_row(variant, draft, counted["plain"], counted["tls"]) for variant, counted in kinds.items()]
    columns = {"variant": ""}
    for kind in ("", "packet_", "tls_", "wire_"):
        columns |= {f"up_{kind}bytes": ",.1f", f"down_{kind}bytes": ",.1f"}
    title = f"draft {draft}, bytes a token: payload, MQTT packets, over TLS, and TCP/IP"
    shown = [{key.replace("link_", "_").replace("_per_token", ""): value for key, value in row.items()} for row in rows]
    table(shown, columns | {"acceptance": ".2f"}, title=title)
    return rows


def _row(variant: Variant, draft: str, plain: Traffic, tls: Traffic) -> dict[str, Any]:
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
        "downlink_bytes_per_token": plain.down / tokens,
        "uplink_packet_bytes_per_token": plain.packets_up / tokens,
        "downlink_packet_bytes_per_token": plain.packets_down / tokens,
        "uplink_tls_bytes_per_token": tls.packets_up / with_tls,
        "downlink_tls_bytes_per_token": tls.packets_down / with_tls,
        "uplink_wire_bytes_per_token": tls.wire_up / with_tls,
        "downlink_wire_bytes_per_token": tls.wire_down / with_tls,
    }


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    found = []
    for draft in dict.fromkeys(row["draft"] for row in rows):
        mine = [row for row in rows if row["draft"] == draft]
        fixed = {row["system"]: row for row in mine if row["draft_length"] == DRAFT and not row["stops"]}
        for system in ("ours-residual", "ours-coupled"):
            if {"dsd", system} <= set(fixed):
                ratio = fixed["dsd"]["uplink_bytes_per_token"] / fixed[system]["uplink_bytes_per_token"]
                found.append(at_least(f"{draft}: DSD's uplink over that of {system}", ratio, _UPLINK))
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
    found: dict[Variant, Traffic],
) -> None:
    options, chosen, words = bench.options, laws.laws[: bench.options.texts], laws.words
    for variant, total in found.items():
        if variant.system == CO_LOCATED:
            total.add(_send_pieces(bench, device, edge, chosen, length=variant.length or 0))
    verifier = MeteredVerifier(ScriptedVerifier(laws, words, name="recorded"))
    settings = EdgeSettings(fleet=bench.fleet, edge=_EDGE, broker=edge, form=form, quotas=NO_QUOTAS)
    with edge_thread(settings, verifier, first_handle=_HANDLE):
        for variant, total in found.items():
            if variant.local:
                continue
            timed = variant.system in _TIMED
            verifier.step_s = options.step_ms / 1e3 * timed
            times = {"token_s": options.token_ms / 1e3 * timed, "round_trip_s": options.round_trip / 1e3 * timed}
            say(variant.name)
            with _CountingDevice(device, bench.fleet, variant, words, **times) as writer:
                writer.write(chosen[0].text(options.texts, variant.mode), tokens=_WARM_UP_TOKENS)  # sets the aliases
                for seed, law in enumerate(chosen):
                    total.add(writer.write(law.text(seed, variant.mode)))


def _settled(relay: Relay) -> tuple[int, ...]:
    """Return a relay's bytes and segments up and down, once nothing moves any more."""
    before: tuple[int, ...] = ()
    while (now := (relay.up, relay.down, *relay.segments)) != before:
        before = now
        time.sleep(_QUIET_S + relay.round_trip_s)
    return now


class _CountingLink(FillingLink):
    """Marks when a request's first draft is sent and when it is closed.

    The opening of a session is left out, because it costs the same for any length.
    """

    def __init__(self, link: PahoLink, relay: Relay, filling: int) -> None:
        super().__init__(link, filling)
        self._relay = relay
        self._began: tuple[int, ...] | None = None
        self.counted: tuple[int, ...] = (0, 0, 0, 0)

    def publish(self, topic: str, payload: bytes, **options: Any) -> None:  # noqa: ANN401 - passed on
        if f"/{Topic.DRAFT.value}" in topic and self._began is None:
            self._began = _settled(self._relay)
        elif topic.endswith(Topic.CLOSE.value) and self._began is not None:
            ended = _settled(self._relay)
            self.counted = tuple(now - then for now, then in zip(ended, self._began, strict=True))
            self._began = None
        super().publish(topic, payload, **options)


class _CountingDevice(AbstractContextManager["_CountingDevice"]):
    """A real device that replays records, on a connection whose bytes are counted."""

    def __init__(
        self,
        broker: BrokerSettings,
        fleet: str,
        variant: Variant,
        words: tuple[str, ...],
        *,
        token_s: float,
        round_trip_s: float,
    ) -> None:
        self._relay = Relay(broker.port, round_trip_s=round_trip_s)
        self._link = PahoLink(broker.model_copy(update={"port": self._relay.port}).link(fleet, _DEVICE, will=None))
        filling = (variant.length or 0) * len(words) * HALF if variant.full_up else 0
        self._counting = _CountingLink(self._link, self._relay, filling)
        self._drafter = RecordedDrafter(WordCodec(words), Vocabulary.of(words), token_s=token_s)
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
        filled = self._counting.filled
        done = self._agent.generate(
            GenerateRequest(tuple(text.prompt), policy=text.policy, max_new_tokens=tokens or len(text.tokens))
        )
        counters, counted = done.counters, self._counting.counted
        up = counters.uplink_bytes + self._counting.filled - filled
        return Traffic(len(done.tokens), counters.tested, counters.accepted, up, counters.downlink_bytes, *counted)


def pieces_of(law: RecordedLaw, *, seed: int, length: int, tokens: int) -> Iterator[tuple[int, ...]]:
    """Yield what each verification of a draft of `length` tokens returns, in coupled mode."""
    text = [coupled_token(p, seed, place) for place, p in enumerate(law.target[:tokens])]
    begin = 0
    while begin < len(text):
        end = begin
        while end < min(begin + length, len(text)) and coupled_token(law.draft[end], seed, end) == text[end]:
            end += 1
        yield tuple(text[begin : end + 1])
        begin = end + 1


def _send_pieces(
    bench: Bench, device: BrokerSettings, edge: BrokerSettings, laws: Sequence[RecordedLaw], *, length: int
) -> Traffic:
    """Send requests that both models generate at the edge, in the messages of edge-only decoding; return the traffic.

    Only the messages are real: the sender sends as many tokens at a time as a verification would have returned.
    """
    draft_topic = build(Topic.DRAFT, fleet=bench.fleet, device=_DEVICE, edge=_EDGE)
    verdict_topic = build(Topic.VERDICT, fleet=bench.fleet, device=_DEVICE)
    options: dict[str, Any] = {"alias": True, "expiry_s": _EXPIRY_S}
    total = Traffic()
    arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with _links(bench.fleet, device, edge) as (relay, writer, sender):
        drafts = wildcard(Topic.DRAFT, fleet=bench.fleet, edge=_EDGE)
        sender.subscribe(drafts, lambda message: arrived.put(message.payload))
        writer.subscribe(verdict_topic, lambda message: arrived.put(message.payload))
        sender.start(timeout_s=_TIMEOUT_S)
        writer.start(timeout_s=_TIMEOUT_S)
        for number, (law, seed) in enumerate([(laws[0], 0), *((law, seed) for seed, law in enumerate(laws))]):
            before, found = _settled(relay), Traffic()
            asked, base, round_ = 0, 0, 0
            for piece in pieces_of(law, seed=seed, length=length, tokens=bench.options.tokens):
                if base >= asked:
                    round_ += 1
                    head = {"handle": _HANDLE, "round": round_, "base": base}
                    payload = encode_draft(Draft(**head, epoch=0, digest=0xFFFFFFFF, write=STREAMED))
                    found.up += len(payload)
                    writer.publish(draft_topic, payload, **options)
                    arrived.get(timeout=_TIMEOUT_S)
                    asked = base + STREAMED // 2
                head = {"handle": _HANDLE, "round": round_, "base": base}
                payload = encode_verdict(Verdict(**head, accepted=0, compute_ms=_COMPUTE_MS, written=piece))
                found.down += len(payload)
                sender.publish(verdict_topic, payload, priority=True, **options)
                arrived.get(timeout=_TIMEOUT_S)
                base += len(piece)
            found.tokens = base
            counts = [now - then for now, then in zip(_settled(relay), before, strict=True)]
            found.packets_up, found.packets_down, found.segments_up, found.segments_down = counts
            if number:  # the first sets the topics' aliases
                total.add(found)
    return total


@contextmanager
def _links(fleet: str, device: BrokerSettings, edge: BrokerSettings) -> Iterator[tuple[Relay, PahoLink, PahoLink]]:
    with Relay(device.port) as relay:
        writer = PahoLink(device.model_copy(update={"port": relay.port}).link(fleet, _DEVICE, will=None))
        sender = PahoLink(edge.link(fleet, _EDGE, will=None))
        try:
            yield relay, writer, sender
        finally:
            writer.stop()
            sender.stop()


def _draw(figure: Any, rows: Sequence[dict[str, Any]]) -> None:  # noqa: ANN401 - matplotlib's
    """Draw payload by system on a logarithmic axis: a panel for each draft model."""
    drafts = list(dict.fromkeys(row["draft"] for row in rows))
    figure.set_size_inches(6.4 * len(drafts), 4.8)
    for place, draft in enumerate(drafts, start=1):
        mine = [row for row in rows if row["draft"] == draft and _both_ways(row) and not row["stops"]]
        shown = [row for row in mine if row["draft_length"] in {None, DRAFT}]
        axes = figure.add_subplot(1, len(drafts), place)
        for offset, way in ((-0.2, "uplink"), (0.2, "downlink")):
            values = [row[f"{way}_bytes_per_token"] for row in shown]
            axes.barh([at + offset for at in range(len(shown))], values, 0.4, label=way)
        axes.set_yticks(range(len(shown)), [f"{row['system']}, {row['mode']}" for row in shown])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("payload, bytes a token")
        axes.set_title(f"draft {draft}")
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].legend(fontsize="small")
