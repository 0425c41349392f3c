"""Padding: what message sizes and times reveal to an observer of TLS (bits), and what padding costs (bytes a token).

One device with a real draft model, one edge over the real target, a real mosquitto. Every draft and verdict is kept
with its time; then each is filled up to buckets of several sizes by the code that does so in service. For each: bytes
a token, how many different sizes there are, and how many bits the sizes of a round reveal of what happened in it, by
plug-in mutual information less what shuffled pairs give. TLS and MQTT add the same number of bytes to every message.
Takes 8 minutes.
"""

import argparse
import time
from collections.abc import Hashable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np

from benchmarks.harness import Bench, Report, link_to, number_of, table
from fleet_admin.models.prompts import PROMPTS
from fleet_common.mqtt.link import Handler, Message
from fleet_common.mqtt.paho_link import PahoLink
from fleet_device.client.agent import Agent
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import FixedPacing, Pacing
from fleet_device.requests.chat import ChatMessage, encode_chat
from fleet_device.requests.generate import GenerateRequest
from schemas.codec import decode_draft, decode_verdict, encode_draft, pad
from schemas.messages import Draft, Verdict
from schemas.policy import Mode, SamplingPolicy
from schemas.topics import Topic, parse

DEVICE: Final = "device-1"
BUCKETS: Final = ((0, 0), (32, 32), (64, 64), (64, 128), (64, 256), (128, 512))
SHUFFLES: Final = 200
TIME_BINS: Final = 8
AUTO: Final = "auto"
_START_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Sent:
    """A hot message on its way.

    Attributes:
        at: Monotonic seconds, at the device.
        payload: Its bytes.
        message: What it holds.
    """

    at: float
    payload: bytes
    message: Draft | Verdict


@dataclass(frozen=True, slots=True)
class Round:
    """A draft, its verdict, and the draft behind it."""

    draft: Sent
    verdict: Sent
    following: Sent | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What an observer sees of messages that are filled up.

    Attributes:
        device: Bucket of the drafts (bytes), 0 for none.
        edge: Of the verdicts.
        up_bytes: Payload of drafts for each token of text.
        down_bytes: Of verdicts.
        draft_sizes: How many different ones there are.
        verdict_sizes: Likewise.
        length_bits: What a draft's size reveals of its length.
        accepted_bits: What a verdict's size reveals of the number of accepted tokens.
        round_bits: What the sizes of draft, verdict and next draft tell of it together, where there is a next one.
    """

    device: int
    edge: int
    up_bytes: float
    down_bytes: float
    draft_sizes: int
    verdict_sizes: int
    length_bits: float
    accepted_bits: float
    round_bits: float


@dataclass(slots=True)
class Writing:
    """Texts of one kind."""

    mode: Mode
    length: str
    tokens: int = 0
    rounds: list[Round] = field(default_factory=list)


class Tap:
    """A link that keeps the hot messages that pass through it."""

    def __init__(self, link: PahoLink) -> None:
        self.sent: list[Sent] = []
        self._link = link

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the link has
        return getattr(self._link, name)

    def publish(self, topic: str, payload: bytes, **options: Any) -> None:  # noqa: ANN401 - the link's
        if parse(topic).topic is Topic.DRAFT:
            self.sent.append(Sent(time.monotonic(), payload, decode_draft(payload)))
        self._link.publish(topic, payload, **options)

    def subscribe(self, topic_filter: str, handler: Handler, **options: Any) -> None:  # noqa: ANN401 - likewise

        def note(message: Message) -> None:
            if parse(message.topic).topic is Topic.VERDICT:
                self.sent.append(Sent(time.monotonic(), message.payload, decode_verdict(message.payload)))
            handler(message)

        self._link.subscribe(topic_filter, note, **options)


def rounds_of(sent: Sequence[Sent]) -> list[Round]:
    """Put the messages of one text together; drafts without a verdict, voided ones, are left out."""
    rounds = []
    drafts = {each.message.round: each for each in sent if isinstance(each.message, Draft)}
    for place, each in enumerate(sent):
        if isinstance(each.message, Verdict) and (draft := drafts.get(each.message.round)) is not None:
            after = sent[place + 1] if place + 1 < len(sent) else None
            behind = after if after is not None and isinstance(after.message, Draft) else None
            rounds.append(Round(draft, each, behind))
    return rounds


def observe(rounds: Sequence[Round], tokens: int, *, device: int, edge: int, seed: int = 0) -> Bucket:
    """Fill the messages up, and measure what is seen."""

    def up(sent: Sent | None) -> int:
        return 0 if sent is None else _draft_bytes(sent, bucket=device)

    drafts = [up(each.draft) for each in rounds]
    verdicts = [len(pad(each.verdict.payload, bucket=edge, most=1 << 20)) for each in rounds]
    with_next = [place for place, each in enumerate(rounds) if each.following is not None]
    whole = [(drafts[place], verdicts[place], up(rounds[place].following)) for place in with_next]
    accepted = [_accepted(each) for each in rounds]
    lengths = [_length(each) for each in rounds]
    return Bucket(
        device=device,
        edge=edge,
        up_bytes=sum(drafts) / tokens,
        down_bytes=sum(verdicts) / tokens,
        draft_sizes=len(set(drafts)),
        verdict_sizes=len(set(verdicts)),
        length_bits=information(lengths, drafts, seed=seed),
        accepted_bits=information(accepted, verdicts, seed=seed),
        round_bits=information([accepted[place] for place in with_next], whole, seed=seed),
    )


def information(secret: Sequence[Hashable], seen: Sequence[Hashable], *, seed: int = 0) -> float:
    """Return the mutual information of two sequences in bits: the plug-in estimate, less the mean of shuffled pairs.

    With few pairs and many values the plug-in estimate is far too high; where there is nothing to know it is as high,
    and that goes off.
    """
    a, b = _codes(secret), _codes(seen)
    rng = np.random.default_rng(seed)
    by_chance = np.mean([_plug_in(rng.permutation(a), b) for _ in range(SHUFFLES)])
    return max(0.0, _plug_in(a, b) - float(by_chance))


def entropy(values: Sequence[Hashable]) -> float:
    """Return how many bits there are to know."""
    codes = _codes(values)
    return _plug_in(codes, codes)


def by_time(rounds: Sequence[Round]) -> dict[str, float]:
    """Return what times tell of the number of accepted tokens (bits): those of the edge, and those of the device."""
    edge = [each.verdict.at - each.draft.at for each in rounds]
    with_next = [each for each in rounds if each.following is not None]
    device = [each.following.at - each.verdict.at for each in with_next if each.following is not None]
    return {
        "edge_time_bits": information([_accepted(each) for each in rounds], _binned(edge)),
        "device_time_bits": information([_accepted(each) for each in with_next], _binned(device)),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft", default="Q4_0", help="quantization of the draft model (default: %(default)s)")
    parser.add_argument("--texts", type=number_of(int, 1), default=16, help="of each kind (default: %(default)s)")
    parser.add_argument("--tokens", type=number_of(int, 1), default=80, help="of each text, at most")
    parser.add_argument("--lengths", nargs="+", default=["4", AUTO], help="draft lengths (default: 4 auto)")
    parser.add_argument("--modes", nargs="+", type=Mode, default=list(Mode), choices=list(Mode))
    parser.add_argument("--dtype", default="auto", help="of the target model")


def run(bench: Bench) -> Report:
    """Write the texts, and pad them afterwards."""
    options, rows = bench.options, []
    model = LlamaCppSettings(path=bench.model(f"{options.draft}.gguf"), threads=1)
    with (
        closing(LlamaCppDrafter(model)) as drafter,
        bench.broker() as broker,
        bench.edge(broker.port, bench.model("target"), engine="torch", dtype=options.dtype),
    ):
        for mode in options.modes:
            for length in options.lengths:
                writing = Writing(mode, length)
                write(broker.port, bench.fleet, drafter, writing, texts=options.texts, tokens=options.tokens)
                rows.append(report(writing))
                _show(rows[-1])
    return Report(rows)


def write(port: int, fleet: str, drafter: Drafter, writing: Writing, *, texts: int, tokens: int) -> None:
    """Write some texts, and keep what passed over the link."""
    pacing: Pacing = AdaptivePacing() if writing.length == AUTO else FixedPacing(int(writing.length))
    tap = Tap(link_to(port, fleet, DEVICE))
    agent = Agent(tap, fleet, DEVICE, drafter, pacing, time.monotonic)
    agent.attach()
    tap.start(timeout_s=_START_S)
    try:
        for number in range(texts):
            prompt = encode_chat(drafter.codec, [ChatMessage("user", PROMPTS[number % len(PROMPTS)])])
            policy = SamplingPolicy(mode=writing.mode, seed=number)
            writing.tokens += len(
                agent.generate(GenerateRequest(tuple(prompt), policy=policy, max_new_tokens=tokens)).tokens
            )
            writing.rounds += rounds_of(tap.sent)
            tap.sent.clear()
    finally:
        tap.stop()


def report(writing: Writing) -> dict[str, Any]:
    """Return all figures of some texts, as JSON values."""
    rounds = writing.rounds
    return {
        "mode": writing.mode.value,
        "draft_length": writing.length,
        "tokens": writing.tokens,
        "rounds": len(rounds),
        "accepted_entropy_bits": entropy([_accepted(each) for each in rounds]),
        "buckets": [asdict(observe(rounds, writing.tokens, device=device, edge=edge)) for device, edge in BUCKETS],
        **by_time(rounds),
    }


def _draft_bytes(sent: Sent, *, bucket: int) -> int:
    assert isinstance(sent.message, Draft)
    return len(encode_draft(sent.message, padding=bucket)) if bucket else len(sent.payload)


def _accepted(each: Round) -> int:
    assert isinstance(each.verdict.message, Verdict)
    return each.verdict.message.accepted


def _length(each: Round) -> int:
    assert isinstance(each.draft.message, Draft)
    return len(each.draft.message.tokens)


def _codes(values: Sequence[Hashable]) -> "np.ndarray[Any, np.dtype[np.int64]]":
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def _plug_in(a: "np.ndarray[Any, np.dtype[np.int64]]", b: "np.ndarray[Any, np.dtype[np.int64]]") -> float:
    if not len(a):
        return 0.0
    joint = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(joint, (a, b), 1.0 / len(a))
    alone = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / alone[there])).sum())


def _binned(times: Sequence[float]) -> list[int]:
    if not times:
        return []
    edges = np.quantile(times, np.linspace(0, 1, TIME_BINS + 1)[1:-1])
    return [int(np.searchsorted(edges, each)) for each in times]


def _show(figures: dict[str, Any]) -> None:
    sizes = {
        "device": "d",
        "edge": "d",
        "up_bytes": ".1f",
        "down_bytes": ".1f",
        "draft_sizes": "d",
        "verdict_sizes": "d",
    }
    title = (
        f"{figures['mode']}, drafts of {figures['draft_length']}: {figures['tokens']} tokens in {figures['rounds']} "
        f"rounds; the number of accepted tokens has {figures['accepted_entropy_bits']:.2f} bits, of which times reveal "
        f"{figures['edge_time_bits']:.2f} (edge) and {figures['device_time_bits']:.2f} (device)"
    )
    bits = {"length_bits": ".2f", "accepted_bits": ".2f", "round_bits": ".2f"}
    table(figures["buckets"], sizes | bits, title=title)
