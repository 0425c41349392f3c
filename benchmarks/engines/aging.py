"""Aging: tokens per second of an edge that has served 500 requests, over those of one that has just started.

For each engine two edges over the same model, in one process, with a broker in memory. One of them serves requests of
mixed length, many of which begin alike, 1 to 16 at a time. Then both decode 1, 2, 4 and 16 sequences, a few steps each
in turn, so that a slow moment of the machine hits both. Each number of sequences meets an edge that has just started.
The remote engine asks a stand-in for vLLM: what is measured is the edge's own part. Takes 15 minutes.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import Bench, Report, at_least, number_of, say, table
from benchmarks.hostile.messages import close_of, open_of
from benchmarks.processes import BenchError
from fleet_common.mqtt.link import Message
from fleet_edge.assembly import assemble
from fleet_edge.settings import EdgeSettings
from fleet_edge.store.records import Record
from fleet_edge.verifiers.contract import Verifier
from fleet_edge.verifiers.scripted import ScriptedVerifier
from schemas.codec import decode_reply, decode_verdict, encode_draft
from schemas.messages import Closed, Draft, Opened
from schemas.policy import SamplingPolicy
from schemas.reasons import Finish
from schemas.topics import Topic, build
from schemas.vocabulary import EMPTY_DIGEST
from tests.support.markov import MarkovScript
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink

FLEET: Final = "aging"
EDGE: Final = "edge-1"
_GOAL: Final = 0.95
"""Least throughput of the aged edge, as a part of the fresh one's."""

_PREFIXES: Final = 8
_AT_ONCE: Final = 16
_STEPS: Final = 6
"""Steps per turn: few, so that both edges meet the same machine load."""

_FEWEST: Final = 5
"""Turns of each edge."""

_SETTLE: Final = 60
"""Warm-up steps: prompts are computed, and the engine orders its sequences."""

_QUOTAS: Final = ("opens_per_min", "drafts_per_s", "prompt_tokens_per_min", "new_tokens_per_min")

_KV_BYTES: Final = 400 << 20
_CONTEXT: Final = 767

MakeVerifier = Callable[[], AbstractContextManager[Verifier]]


class _Forgetting:
    def put(self, record: Record, *, urgent: bool = False, then: Callable[[], None] | None = None) -> None:
        del record, urgent
        if then is not None:
            then()


class _Device:
    def __init__(self, edge: "_Edge", number: int) -> None:
        self._edge, self.name = edge, f"device-{number}"
        self._session, self._handle, self._write = b"", 0, 0
        self.busy = False
        self._link = MemoryLink(edge.broker, self.name)
        self._link.subscribe(build(Topic.SESSION, fleet=FLEET, device=self.name), self._replied)
        self._link.subscribe(build(Topic.VERDICT, fleet=FLEET, device=self.name), self._written)
        self._link.start(timeout_s=1.0)

    def ask(self, prompt: Sequence[int], tokens: int, rng: random.Random) -> None:
        self._session, self._write, self.busy = rng.randbytes(8), tokens, True
        # The largest `top_k` of all engines, and nearly uniform: requests hardly ever end early.
        policy = SamplingPolicy(seed=rng.getrandbits(32), temperature=2.0, top_k=4, top_p=1.0)
        vocabulary = self._edge.verifier.info.vocabulary
        self._send(
            Topic.OPEN,
            open_of(vocabulary, prompt=tuple(prompt), policy=policy, max_new_tokens=tokens, session=self._session),
        )

    def give_up(self) -> None:
        if self.busy:
            self._send(Topic.CLOSE, close_of(session=self._session, handle=self._handle, edge=EDGE))
            self.busy = False

    def _replied(self, message: Message) -> None:
        reply = decode_reply(message.payload)
        if not isinstance(reply, Opened | Closed):
            self._edge.failure = reply.sentence
        if isinstance(reply, Opened) and reply.session == self._session:
            self._handle = reply.handle
            draft = Draft(
                handle=reply.handle, round=1, epoch=0, base=0, counts=(), digest=EMPTY_DIGEST, write=self._write
            )
            self._send(Topic.DRAFT, encode_draft(draft), edge=EDGE)

    def _written(self, message: Message) -> None:
        verdict = decode_verdict(message.payload)
        if verdict.handle == self._handle and verdict.finish is not Finish.NO:
            self.give_up()

    def _send(self, topic: Topic, payload: bytes, *, edge: str | None = None) -> None:
        self._link.publish(build(topic, fleet=FLEET, device=self.name, edge=edge), payload)


class _Edge:
    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.broker = MemoryBroker()
        self.failure = ""
        # The devices are the benchmark's own and have no quotas.
        quotas = dict.fromkeys(_QUOTAS, 1e6)
        settings = EdgeSettings.model_validate({"fleet": FLEET, "edge": EDGE, "quotas": quotas, "background_share": 1})
        link = MemoryLink(self.broker, EDGE)
        self._orchestrator = assemble(
            settings,
            verifier=verifier,
            link=link,
            sink=_Forgetting(),
            clock=time.monotonic,
            now=lambda: datetime.now(UTC),
        )
        link.start(timeout_s=1.0)
        self.devices = [_Device(self, number) for number in range(_AT_ONCE)]

    def step(self) -> None:
        """Compute a step; nothing is computed afterwards."""
        self.broker.pump()
        self._orchestrator.step()
        self._orchestrator.rest()
        if self.failure:
            raise BenchError(f"The edge has refused a request: {self.failure}")

    def committed(self) -> int:
        return sum(session.committed for session in self._orchestrator.sessions)

    def serve(self, requests: int, rng: random.Random) -> None:
        """Serve requests of random concurrency and mixed length, some of which begin alike."""
        longest = min(256, self.verifier.info.context // 2)
        shared = [self.prompt(rng.randrange(longest // 8, longest), rng) for _ in range(_PREFIXES)]
        left = requests
        while left or any(device.busy for device in self.devices):
            at_once = rng.choice((1, 2, 4, 8, _AT_ONCE))
            for device in [device for device in self.devices if not device.busy][: max(0, at_once - self._busy())]:
                if left:
                    left -= 1
                    begin = rng.choice(shared) if rng.random() < 0.7 else []
                    own = self.prompt(rng.randrange(8, longest // 4), rng)
                    device.ask([*begin, *own][: 3 * longest // 2], rng.randrange(2, 24), rng)
            self.step()

    def decode(self, sequences: int, rng: random.Random) -> None:
        """Decode as many requests, each long enough to be measured for a while."""
        missing = [device for device in self.devices[:sequences] if not device.busy]
        for device in missing:
            device.ask(self.prompt(32, rng), self.verifier.info.context - 40, rng)
        for _ in range(_SETTLE if missing else 0):
            self.step()

    def burst(self) -> float | None:
        """Compute a few steps; return the tokens per second, or None if a request ended meanwhile."""
        busy, before, began = self._busy(), self.committed(), time.perf_counter()
        for _ in range(_STEPS):
            self.step()
        rate = (self.committed() - before) / (time.perf_counter() - began)
        return rate if self._busy() == busy else None

    def end(self) -> None:
        for device in self.devices:
            device.give_up()
        self.step()

    def prompt(self, tokens: int, rng: random.Random) -> list[int]:
        """Return random tokens, none of which ends a request."""
        info = self.verifier.info
        return [token for token in rng.choices(range(info.vocabulary.size), k=tokens) if token not in info.end_tokens]

    def _busy(self) -> int:
        return sum(device.busy for device in self.devices)


def measure(
    engine: str, make: MakeVerifier, *, requests: int, sequences: Sequence[int], seconds: float
) -> Iterator[dict[str, Any]]:
    with make() as verifier:
        old = _Edge(verifier)
        old.serve(requests, random.Random(0))
        for number in sequences:
            with make() as another:
                edges, rng = (old, _Edge(another)), random.Random(number)
                rates: list[tuple[float, float]] = []
                until = time.monotonic() + seconds
                while time.monotonic() < until or len(rates) < _FEWEST:
                    for edge in edges:
                        edge.decode(number, rng)
                    first, second = edges if len(rates) % 2 else edges[::-1]
                    found = {edge: edge.burst() for edge in (first, second)}
                    aged, fresh = (found[edge] for edge in edges)
                    if aged and fresh:
                        rates.append((aged, fresh))
                old.end()
            of_aged, of_fresh = zip(*rates, strict=True)
            yield {
                "engine": engine,
                "sequences": number,
                "aged": statistics.median(of_aged),
                "fresh": statistics.median(of_fresh),
                "ratio": statistics.median(one / other for one, other in rates),
                "turns": len(rates),
            }


@contextmanager
def _llama_cpp(models: Path, threads: int) -> Iterator[MakeVerifier]:
    from fleet_edge.verifiers.llama_cpp.slab import open_target  # noqa: PLC0415 - only where it is measured
    from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier  # noqa: PLC0415

    @contextmanager
    def make() -> Iterator[Verifier]:
        target = open_target(models / "target-Q8_0.gguf", gpu_layers=0)
        yield LlamaCppVerifier(target, budget_bytes=_KV_BYTES, context=_CONTEXT, threads=threads)

    yield make


@contextmanager
def _packed(models: Path, threads: int) -> Iterator[MakeVerifier]:
    import torch  # noqa: PLC0415

    from benchmarks.engines import of_torch  # noqa: PLC0415
    from fleet_edge.verifiers.packed.verifier import PackedVerifier  # noqa: PLC0415

    torch.set_num_threads(threads)
    target = of_torch.load(models / "target", dtype="int8", device="cpu")

    @contextmanager
    def make() -> Iterator[Verifier]:
        yield PackedVerifier(target, budget_bytes=_KV_BYTES)

    yield make


@contextmanager
def _remote(_models: Path, _threads: int) -> Iterator[MakeVerifier]:
    """Make verifiers over a stand-in for vLLM: only the edge's own part is measured."""
    from fleet_edge.settings import InferenceServerSettings  # noqa: PLC0415
    from fleet_edge.verifiers.remote.loading import LocalTokens, sample_tokens  # noqa: PLC0415
    from fleet_edge.verifiers.remote.verifier import connect  # noqa: PLC0415
    from tests.support.inference_server import InferenceServer  # noqa: PLC0415

    script = MarkovScript(size=500, seed=1)
    local = LocalTokens("scripted", list(script.words), ())

    @contextmanager
    def make() -> Iterator[Verifier]:
        scripted = ScriptedVerifier(script, script.words, context=_CONTEXT, end_tokens=())
        with InferenceServer(scripted, script.words, api="vllm", max_model_len=_CONTEXT + 8) as server:
            settings = InferenceServerSettings(api="vllm", top_logprobs=8)
            verifier = connect(settings, local, [server.url], samples=sample_tokens(local.strings, ()))
            try:
                yield verifier
            finally:
                verifier.shut_down()

    yield make


_ENGINES: Final = {"llama_cpp": _llama_cpp, "packed": _packed, "remote": _remote}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engines", nargs="+", choices=list(_ENGINES), default=list(_ENGINES))
    parser.add_argument("--requests", type=number_of(int, 1), default=500, help="that age an edge (%(default)s)")
    parser.add_argument("--sequences", type=number_of(int, 1), nargs="+", default=[1, 2, 4, 16], metavar="B")
    parser.add_argument("--seconds", type=number_of(float, 0), default=8.0, help="for each of these (%(default)s)")
    parser.add_argument("--threads", type=number_of(int, 1), default=len(os.sched_getaffinity(0)))


def run(bench: Bench) -> Report:
    options = bench.options
    rows: list[dict[str, Any]] = []
    for engine in options.engines:
        say(f"{engine}: serving {options.requests} requests")
        with _ENGINES[engine](options.models, options.threads) as make:
            here = list(
                measure(
                    engine,
                    make,
                    requests=options.requests,
                    sequences=options.sequences,
                    seconds=options.seconds,
                )
            )
        table(here, {"engine": "", "sequences": "d", "aged": ".1f", "fresh": ".1f", "ratio": ".2f", "turns": "d"})
        rows += here
    goals = [at_least(f"{row['engine']}, {row['sequences']} sequences", row["ratio"], _GOAL) for row in rows]
    return Report(rows, goals)
