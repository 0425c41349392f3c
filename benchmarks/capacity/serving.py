"""Serving without a network: clients in the same process as an engine, which chooses what a step computes."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.capacity.service_level import Client, TimedRequest, TimeWindow
from benchmarks.fleet_load import FleetLoad
from benchmarks.harness import ENGINES, Bench, say
from benchmarks.raw_llama import CHUNK, STEP, RawPrompt, StepOutput
from benchmarks.recordings import Recording, cache_of, load, save
from fleet_admin.models.prompts import Prompt
from fleet_device.requests.generate import Cancellation, GenerateRequest, Generation, RequestContext
from fleet_edge.batching.judging import Case, judge_batch
from fleet_edge.batching.shaping import shape_rows
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import Item, Logits, Verifier
from fleet_edge.verifiers.registry import load_verifier
from sampling.distribution import Dist
from sampling.downlink import correct, dense
from sampling.drawing import Proposal, propose
from sampling.verification import Judgement
from schemas.errors import FleetError
from schemas.policy import Mode
from schemas.reasons import EndReason
from tests.support.recorded_drafter import RecordedText

_END_S: Final = 60.0
_LOOK_S: Final = 0.02
_AFTER_FAILURE_S: Final = 0.5
_DEVICE_S: Final = 0.3


@dataclass(frozen=True, slots=True)
class CellTiming:
    seconds: float
    settle_s: float
    patience_s: float
    tokens: int = 1

    def patience_of(self, devices: int) -> float:
        """Return the wait for a number of devices: an edge computes their prompts one after another."""
        return self.patience_s + _DEVICE_S * devices


class Warming:
    def __init__(self, timing: CellTiming, clients: Sequence[Client], started: float) -> None:
        self._timing = timing
        self._clients = clients
        self._latest = started + timing.patience_of(len(clients))
        self._window: TimeWindow | None = None

    def window(self, now: float) -> TimeWindow | None:
        """Return the window once it is known; poll it."""
        if self._window is None:
            least = self._timing.tokens
            served = all(sum(text.tokens for text in client.texts[:least]) >= least for client in self._clients)
            if served or now >= self._latest:
                begin = now + self._timing.settle_s if served else now
                self._window = TimeWindow(begin, begin + self._timing.seconds)
        return self._window

    def over(self, now: float) -> bool:
        window = self.window(now)
        return window is not None and now >= window.end


Thing = TypeVar("Thing")


def texts_of(client: int, texts: Sequence[Thing]) -> Iterator[Thing]:
    """Yield a client's texts without end; each client begins with another."""
    return islice(cycle(texts), client, None)


@dataclass(slots=True)
class Measured:
    clients: list[Client]
    window: TimeWindow
    generations: list[Generation] = field(default_factory=list)
    as_recorded: list[bool] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    def bytes_per_token(self) -> tuple[float, float]:
        tokens = max(1, sum(len(each.tokens) for each in self.generations))
        up = sum(each.counters.uplink_bytes for each in self.generations)
        return up / tokens, sum(each.counters.downlink_bytes for each in self.generations) / tokens


class Devices(FleetLoad):
    """Devices that run one request after another; their pacings keep learning.

    A replayed request that leaves the recorded output ends there, because the record does not say how it continues.
    """

    def measure(
        self,
        texts: Sequence[Iterator[RecordedText]],
        timing: CellTiming,
        *,
        mode: Mode,
        replayed: bool = True,
        on_window: Callable[[], None] = lambda: None,
    ) -> Measured:
        """Let all devices generate until the window is over; running requests are cancelled then."""
        clients = [Client() for _ in self._agents]
        measured = Measured(clients, TimeWindow(0.0, 0.0))
        over = threading.Event()
        cancellations = [Cancellation() for _ in self._agents]
        threads = [
            threading.Thread(
                target=self._go_on, args=(n, texts[n], mode, replayed, cancellations[n], over, measured), daemon=True
            )
            for n in range(len(self._agents))
        ]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        warming = Warming(timing, clients, started)
        while (window := warming.window(time.monotonic())) is None or time.monotonic() < window.begin:
            time.sleep(_LOOK_S)
        on_window()
        time.sleep(max(0.0, window.end - time.monotonic()))
        on_window()
        over.set()
        for cancellation in cancellations:
            cancellation.cancel()
        deadline = time.monotonic() + _END_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        measured.window = window
        if stuck := sum(thread.is_alive() for thread in threads):
            measured.failed[f"not ended within {_END_S:.0f} s"] += stuck
        return measured

    def _go_on(
        self,
        number: int,
        texts: Iterator[RecordedText],
        mode: Mode,
        replayed: bool,
        cancellation: Cancellation,
        over: threading.Event,
        measured: Measured,
    ) -> None:
        agent, drafter = self._agents[number], self._drafters[number]
        for recorded in texts:
            if over.is_set():
                return
            text = TimedRequest(time.monotonic())
            measured.clients[number].texts.append(text)
            drafter.play(recorded)
            received: list[int] = []

            def take(
                new: Sequence[int],
                text: TimedRequest = text,
                received: list[int] = received,
                tokens: Sequence[int] = recorded.tokens,
            ) -> bool:
                text.pieces.append((time.monotonic(), len(new)))
                received.extend(new)
                return replayed and tuple(received) != tokens[: len(received)]

            try:
                done = agent.generate(
                    GenerateRequest(
                        recorded.prompt,
                        policy=recorded.policy.model_copy(update={"mode": mode}),
                        max_new_tokens=len(recorded.tokens),
                    ),
                    RequestContext(on_tokens=take, cancellation=cancellation),
                )
            except FleetError as error:
                measured.failed[f"{type(error).__name__}: {error}"] += not over.is_set()
                over.wait(_AFTER_FAILURE_S)
                continue
            if not over.is_set():
                text.ended_at = time.monotonic()
            measured.generations.append(done)
            if done.reason in (EndReason.STOP, EndReason.LENGTH):
                measured.as_recorded.append(done.tokens == recorded.tokens)


CELLS: Final = 256
"""Tokens of a prompt and its output, plus one."""

KV_BYTES: Final = 4 << 30


def verifier_over(
    path: Path, *, threads: int, batch_invariant: bool, engine: Mapping[str, str] = ENGINES["llama.cpp"]
) -> Verifier:
    """Return the edge's own verifier over a GGUF."""
    return load_verifier(
        EdgeSettings.model_validate(
            {
                "target": str(path),
                "context": CELLS - 1,
                "kv_bytes": KV_BYTES,
                "threads": threads,
                "batch_invariant": batch_invariant,
                **engine,
            }
        )
    )


def serve(
    engine: Any,  # noqa: ANN401 - a `RawEngine`
    texts: Sequence[Iterator[RawPrompt]],
    timing: CellTiming,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[list[Client], TimeWindow]:
    """Serve clients until the window is over; return them, and the window."""
    started = clock()
    clients = [Client() for _ in texts]
    warming = Warming(timing, clients, started)

    def ask(slot: int, at: float) -> None:
        clients[slot].texts.append(TimedRequest(at))
        engine.begin(slot, next(texts[slot]))

    for slot in range(len(clients)):
        ask(slot, started)
    while not warming.over(clock()):
        for slot, written in engine.step().items():
            at, text = clock(), clients[slot].texts[-1]
            text.pieces.append((at, len(written.new)))
            if written.ended:
                text.ended_at = at
                ask(slot, at)
    window = warming.window(clock())
    assert window is not None
    return clients, window


_TOGETHER = 8


@dataclass(slots=True)
class EngineSlot:
    prompt: RawPrompt
    text: list[int] = field(default_factory=list)
    said: dict[int, Dist] = field(default_factory=dict)
    drafted: list[Proposal] = field(default_factory=list)

    @property
    def known(self) -> tuple[int, ...]:
        return (*self.prompt.tokens, *self.text)


class Together:
    """Two models: in a step the draft model drafts for all requests and the target verifies all drafts."""

    def __init__(self, target: Verifier, draft: Verifier, *, length: int) -> None:
        self._target = target
        self._draft = draft
        self._length = length
        self._slots: dict[int, EngineSlot] = {}
        self.ended: dict[int, EngineSlot] = {}

    def begin(self, slot: int, prompt: RawPrompt) -> None:
        self._slots[slot] = EngineSlot(prompt)
        self.ended.pop(slot, None)
        self._target.open(slot)
        self._draft.open(slot)

    def step(self) -> Mapping[int, StepOutput]:
        writing = {number: slot for number, slot in self._slots.items() if self._ready(number, slot)}
        self._propose(writing)
        items, cases = [], []
        for number, slot in writing.items():
            tokens = tuple(each.token for each in slot.drafted)
            counts = None
            if slot.prompt.policy.mode is not Mode.COUPLED:
                counts = tuple(each.count or 0 for each in slot.drafted)
            new = slot.known[self._target.computed(number) :]
            items.append(Item(number, (*new, *tokens), len(tokens) + 1))
            cases.append(Case(tokens, counts, slot.prompt.policy, len(slot.text), bonus=True))
        if prompts := self._prompts(CHUNK if items else STEP):
            self._draft.score(prompts)
        judged = self._judge(self._target.score([*items, *prompts]), cases, list(writing.values()))
        return {
            number: self._take(number, slot, judgement)
            for (number, slot), judgement in zip(writing.items(), judged, strict=True)
        }

    def _judge(self, logits: Logits, cases: Sequence[Case], slots: Sequence[EngineSlot]) -> list[Judgement | None]:
        """Decide on the draft of each of the slots."""
        del slots
        return judge_batch(logits, cases)

    def _ready(self, number: int, slot: EngineSlot) -> bool:
        """Return whether all of a request but its last token is computed, so that it can be drafted for."""
        return self._target.computed(number) >= len(slot.prompt.tokens) - 1

    def _propose(self, writing: Mapping[int, EngineSlot]) -> None:
        for slot in writing.values():
            slot.drafted = []
        for _ in range(self._length):
            going = {
                number: slot
                for number, slot in writing.items()
                if len(slot.text) + len(slot.drafted) < slot.prompt.most
            }
            if not going:
                return
            items = []
            for number, slot in going.items():
                known = (*slot.known, *(each.token for each in slot.drafted))
                items.append(Item(number, known[self._draft.computed(number) :], 1))
            policies = [slot.prompt.policy for slot in going.values()]
            shaped = shape_rows(_array(self._draft.score(items)), policies, policies[0].top_k)
            for row, slot in enumerate(going.values()):
                position = len(slot.text) + len(slot.drafted)
                slot.said[position] = shaped.row(row)
                slot.drafted.append(propose(slot.said[position], policy=slot.prompt.policy, position=position))

    def _prompts(self, room: int) -> Sequence[Item]:
        items = []
        for number, slot in self._slots.items():
            if not self._ready(number, slot) and room > 0:
                begin = self._target.computed(number)
                tokens = slot.prompt.tokens[begin:-1][:room]
                items.append(Item(number, tokens, 0))
                room -= len(tokens)
        return items

    def _take(self, number: int, slot: EngineSlot, judged: Judgement | None) -> StepOutput:
        assert judged is not None
        new = [*(each.token for each in slot.drafted[: judged.accepted]), self._token(slot, judged)]
        ends = self._target.info.end_tokens
        end = next((place + 1 for place, each in enumerate(new) if each in ends), len(new))
        new = new[: min(end, slot.prompt.most - len(slot.text))]
        slot.text += new
        ended = slot.text[-1] in ends or len(slot.text) >= slot.prompt.most
        if ended:
            self.ended[number] = self._slots.pop(number)
            self._target.close(number)
            self._draft.close(number)
        else:
            known = len(slot.prompt.tokens) + len(slot.text) - 1
            self._target.truncate(number, min(known, self._target.computed(number)))
            self._draft.truncate(number, min(known, self._draft.computed(number)))
        return StepOutput(tuple(new), ended)

    def _token(self, slot: EngineSlot, judged: Judgement) -> int:
        """Return the token after the accepted ones; in residual mode as a device draws it."""
        if judged.token is not None:
            return judged.token
        quantized = slot.drafted[judged.accepted].quantized
        assert isinstance(judged.p, Dist)
        assert quantized is not None
        token = correct(
            dense(judged.p, self._target.info.vocabulary.size),
            quantized,
            policy=slot.prompt.policy,
            position=len(slot.text) + judged.accepted,
        )
        assert token is not None
        return token


def _array(logits: Logits) -> NDArray[np.float32]:
    return logits if isinstance(logits, np.ndarray) else logits.float().cpu().numpy()


def record_residual(
    bench: Bench, coupled: Recording, asked: Sequence[Prompt], *, length: int, tokens: int, threads: int
) -> Recording:
    """Return a pair's recording in residual mode, made now or taken from the cache."""
    residual = [text.policy.model_copy(update={"mode": Mode.RESIDUAL}) for text in coupled.texts]
    file = cache_of(bench, f"residual-{length}-{coupled.draft}", coupled.draft, asked, tokens)
    if not file.exists():
        say(f"recording what the target and {coupled.draft} generate together in residual mode, once")
        draft = bench.model(f"{coupled.draft}.gguf")
        target = verifier_over(bench.target(), threads=threads, batch_invariant=True, engine=bench.engine)
        drafting = verifier_over(draft, threads=threads, batch_invariant=False)
        prompts = [RawPrompt(text.prompt, policy, tokens) for text, policy in zip(coupled.texts, residual, strict=True)]
        slots = write_all(Together(target, drafting, length=length), prompts)
        save(file, {"texts": [slot.text for slot in slots]}, {"draft": [said_along(slot) for slot in slots]})
    ints, dists = load(file)
    recorded = (
        replace(text, policy=policy, tokens=tuple(map(int, own)), dists=said)
        for text, policy, own, said in zip(coupled.texts, residual, ints["texts"], dists["draft"], strict=True)
    )
    return replace(coupled, texts=tuple(recorded))


def write_all(together: Together, prompts: Sequence[RawPrompt]) -> list[EngineSlot]:
    """Complete all prompts, some at a time; return them in order."""
    slots: list[EngineSlot] = []
    for first in range(0, len(prompts), _TOGETHER):
        some = prompts[first : first + _TOGETHER]
        for number, prompt in enumerate(some):
            together.begin(number, prompt)
        while len(together.ended) < len(some):
            together.step()
        slots += [together.ended.pop(number) for number in range(len(some))]
    return slots


def said_along(slot: EngineSlot) -> list[Dist]:
    """Return the recorded distribution at each position; after a draft, where the target generated, there is none."""
    return [slot.said.get(place, Dist(np.array([token]), np.array([1.0]))) for place, token in enumerate(slot.text)]
