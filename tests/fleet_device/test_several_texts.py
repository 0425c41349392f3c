import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fleet_device.client.agent import Handles, Lane, Lanes
from fleet_device.client.messaging import Inbox
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.errors import TextCancelled
from fleet_device.requests.generate import Cancellation
from fleet_device.settings import DeviceSettings
from fleet_edge.orchestrator import Orchestrator
from schemas.codec import decode_open
from schemas.policy import Grammar, Mode, SamplingPolicy
from schemas.topics import Topic, wildcard
from tests.fleet_device.test_device import COUPLED, LONG, at_home, made
from tests.support.grammar_processes import end_at
from tests.support.memory_device import TalkingDrafter, announce_edge, at_work, edge_at_work
from tests.support.memory_fleet import FLEET, MemoryFleet, lossless_text, terms
from tests.support.memory_link import MemoryLink
from tests.support.scripted_edge import LoneDevice
from tests.support.toy_grammar import GRAMMAR, TEXTS
from tests.support.waiting import PATIENCE_S, until

DEFAULT = DeviceSettings.model_fields["requests_at_once"].default


class CountedDrafter(TalkingDrafter):
    def __init__(self) -> None:
        super().__init__()
        self.sequences = 1

    def another(self) -> ScriptedDrafter:
        self.sequences += 1
        return super().another()


def expected(seed: int, length: int = LONG) -> tuple[int, ...]:
    return tuple(lossless_text(terms(seed, mode=Mode.COUPLED, max_new_tokens=length)))


@pytest.mark.parametrize("at_once", [2, 3])
def test_texts_that_are_written_at_once_are_each_the_target_s_own(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds, open_sessions = range(12), set[int]()
    step = Orchestrator.step

    def watched(edge: Orchestrator, **given: float) -> bool:
        computed = step(edge, **given)
        open_sessions.add(len(edge.sessions))
        return computed

    monkeypatch.setattr(Orchestrator, "step", watched)
    with at_home(requests_at_once=at_once) as (device, _), ThreadPoolExecutor(6) as pool:
        texts = pool.map(
            lambda seed: device.generate("t1 t2", raw=True, max_new_tokens=LONG, seed=seed, **COUPLED), seeds
        )
        assert [text.tokens for text in texts] == [expected(seed) for seed in seeds]
    assert max(open_sessions) == at_once


def test_requests_beyond_the_edges_limit_wait_for_one_of_the_device_to_end() -> None:
    fleet = MemoryFleet(settings={"max_sessions_per_device": 2})
    announce_edge(fleet, sessions_per_device=2)
    with at_work(fleet), made(fleet, requests_at_once=6) as device, ThreadPoolExecutor(6) as pool:
        seeds = range(6)
        texts = pool.map(
            lambda seed: device.generate("t1 t2", raw=True, max_new_tokens=LONG, seed=seed, **COUPLED), seeds
        )
        assert [text.tokens for text in texts] == [expected(seed) for seed in seeds]
    assert not [event for event in fleet.sink.of("event") if event.code == "busy"]


def test_new_grammars_of_all_running_requests_wait_to_be_compiled() -> None:
    fleet = MemoryFleet()
    announce_edge(fleet)
    with at_work(fleet), made(fleet, requests_at_once=DEFAULT) as device, ThreadPoolExecutor(DEFAULT) as pool:
        grammars = [Grammar.regex(f"t1 (t{number % 4 + 2} ){{{number + 1}}}") for number in range(DEFAULT)]
        texts = pool.map(
            lambda grammar: device.generate("t1 t2", raw=True, max_new_tokens=LONG, grammar=grammar), grammars
        )
        assert [text.text.count(f"t{number % 4 + 2}") for number, text in enumerate(texts)] == [*range(1, DEFAULT + 1)]


def test_an_application_whose_request_ends_grammar_processes_bans_the_grammar_for_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with at_home() as (device, _):
        agent, policy = device._require_open().service.agent, SamplingPolicy(grammar=GRAMMAR)
        cause = agent._constraint(policy)
        assert cause is not None
        assert cause.forced((4,)) == 5
        with monkeypatch.context() as patch:
            end_at(patch, (4,), times=1)
            assert cause.forced((4,)) == 5, "another request was the cause"
            end_at(patch, (4,))
            assert cause.forced((4,)) is None
        other = agent._constraint(policy)
        assert other is not None
        assert other.forced((4,)) == 5
        found = device.generate("t1 t2", raw=True, max_new_tokens=LONG, grammar=GRAMMAR)
        assert tuple(token for token in found.tokens if token) in TEXTS


def test_a_text_that_waits_for_ever_does_not_keep_the_other_from_being_written() -> None:
    with at_home(requests_at_once=2, answer_s=600.0) as (device, fleet):
        long = device.stream("t1 t2", raw=True, max_new_tokens=4000, seed=6, **COUPLED)
        next(iter(long))
        assert device.generate("t1 t2", raw=True, max_new_tokens=LONG, seed=6, **COUPLED).tokens == expected(6)
        assert device.generate("t1 t2", raw=True, max_new_tokens=LONG, seed=7, **COUPLED).tokens == expected(7)
        long.close()
        until(lambda: len(fleet.edge.sessions) == 0)


def test_no_two_sessions_of_a_device_have_the_same_handle() -> None:
    handles = Handles()
    assert handles.claim(b"one", 7)
    assert handles.claim(b"one", 7)
    assert not handles.claim(b"two", 7)
    assert handles.claim(b"two", 8)
    assert handles.claim(b"one", 9)
    assert handles.claim(b"two", 7)
    handles.release(b"two")
    assert handles.claim(b"one", 7)


def test_a_text_whose_handle_another_one_has_asks_for_a_new_one() -> None:
    device = LoneDevice(MemoryFleet())
    fleet_handle = next(iter(_first_handles(device)))
    device.agent._handles.claim(b"another", fleet_handle)
    done = device.generate(mode=Mode.COUPLED)
    assert (done.resumes, done.tokens) == (1, expected(6, 8))


def _first_handles(device: LoneDevice) -> list[int]:
    return [device._fleet.edge.sessions._next]


def test_eight_requests_begin_at_once_with_two_sequences_of_the_draft_model() -> None:
    fleet, drafter = MemoryFleet(), CountedDrafter()
    opened: set[bytes] = set()
    listener = MemoryLink(fleet.broker, "listener")
    listener.subscribe(
        wildcard(Topic.OPEN, fleet=FLEET), lambda message: opened.add(decode_open(message.payload).session)
    )
    listener.start(timeout_s=1.0)
    announce_edge(fleet)
    with fleet.broker.running(), made(fleet, drafter, requests_at_once=DEFAULT) as device:
        seeds = range(8)
        streams = [device.stream("t1 t2", raw=True, max_new_tokens=LONG, seed=seed, **COUPLED) for seed in seeds]
        until(lambda: len(opened) == 8)
        assert drafter.sequences == 2
        with edge_at_work(fleet):
            assert [stream.result().tokens for stream in streams] == [expected(seed) for seed in seeds]


@pytest.mark.parametrize(
    ("given", "sequences"),
    [({}, 2), ({"edge_only": True}, 2), ({"edge_only": False}, 5), ({"requests_at_once": 1}, 1)],
)
def test_more_requests_need_a_draft_sequence_without_edge_decoding(given: dict[str, Any], sequences: int) -> None:
    fleet, drafter = MemoryFleet(), CountedDrafter()
    with fleet.broker.running(), made(fleet, drafter, **{"requests_at_once": 5, **given}):
        assert drafter.sequences == sequences


def test_requests_that_may_go_on_alone_always_have_the_draft_model(tmp_path: Path) -> None:
    fleet = MemoryFleet()
    with (
        fleet.broker.running(),
        made(fleet, requests_at_once=DEFAULT, offline_s=0.0, state_dir=tmp_path) as device,
        ThreadPoolExecutor(8) as pool,
    ):
        texts = list(
            pool.map(
                lambda seed: device.generate(
                    "t1 t2", raw=True, max_new_tokens=LONG, seed=seed, offline="local", **COUPLED
                ),
                range(8),
            )
        )
    assert all(text.unverified == len(text.tokens) > 0 for text in texts)


def test_without_edge_only_decoding_from_afar_further_requests_wait_for_the_draft_model() -> None:
    with at_home(requests_at_once=4) as (device, _fleet), ThreadPoolExecutor(6) as pool:
        service = device._require_open().service
        device.settings.edge_only = False
        service.take_settings({"edge_only"})
        texts = list(
            pool.map(
                lambda seed: device.generate("t1 t2", raw=True, max_new_tokens=LONG, seed=seed, **COUPLED), range(6)
            )
        )
    assert [text.tokens for text in texts] == [expected(seed) for seed in range(6)]
    assert all(text.generation.counters.edge_only == 0 for text in texts)


class Turns:
    def __init__(self) -> None:
        self.model, self.edge_only = (Lane(TalkingDrafter(), None, Inbox(), edge_only=only) for only in (False, True))
        self.lanes = Lanes([self.edge_only, self.model])
        self.pool = ThreadPoolExecutor(4)

    def begin(
        self, *, drafts: bool, cancellation: Cancellation | None = None, edge_only: bool = False
    ) -> tuple[list[Lane], threading.Event]:
        got: list[Lane] = []
        over = threading.Event()

        def run() -> None:
            cancels = cancellation or Cancellation()
            with self.lanes.acquire([1], drafts=drafts, cancellation=cancels, edge_only=edge_only) as lane:
                got.append(lane)
                over.wait(PATIENCE_S)

        self.pool.submit(run)
        return got, over


def test_a_request_prefers_the_draft_model_and_one_that_needs_it_waits_and_comes_first() -> None:
    turns = Turns()
    first, end_first = turns.begin(drafts=False)
    until(lambda: first == [turns.model])
    waiting, end_waiting = turns.begin(drafts=True)
    until(lambda: turns.lanes.waiting == 1)
    other, end_other = turns.begin(drafts=False)
    until(lambda: other == [turns.edge_only])
    last, end_last = turns.begin(drafts=True)
    until(lambda: turns.lanes.waiting == 2)
    assert not waiting
    end_first.set()
    until(lambda: waiting == [turns.model])
    end_other.set()
    end_waiting.set()
    until(lambda: last == [turns.model])
    end_last.set()
    turns.pool.shutdown()


def test_the_last_place_at_the_edges_is_for_a_request_that_needs_the_draft_model() -> None:
    turns = Turns()
    turns.lanes.limit(1)
    first, end_first = turns.begin(drafts=False, edge_only=True)
    until(lambda: first == [turns.edge_only])
    waiting, end_waiting = turns.begin(drafts=True)
    until(lambda: turns.lanes.waiting == 1)
    other, end_other = turns.begin(drafts=False)
    end_first.set()
    until(lambda: waiting == [turns.model])
    assert not other
    turns.lanes.limit(None)
    until(lambda: other == [turns.edge_only])
    end_waiting.set()
    end_other.set()
    turns.pool.shutdown()


def test_a_request_that_drafts_nothing_leaves_the_draft_model_to_others() -> None:
    turns = Turns()
    first, end_first = turns.begin(drafts=False, edge_only=True)
    until(lambda: first == [turns.edge_only])
    second, end_second = turns.begin(drafts=False, edge_only=True)
    until(lambda: second == [turns.model])
    end_first.set()
    end_second.set()
    turns.pool.shutdown()


def test_a_request_that_waits_for_the_draft_model_can_be_cancelled() -> None:
    turns, cancellation = Turns(), Cancellation()
    with turns.lanes.acquire([1], drafts=True, cancellation=Cancellation()):
        threading.Timer(0.0, lambda: (until(lambda: turns.lanes.waiting == 1), cancellation.cancel())).start()
        with pytest.raises(TextCancelled), turns.lanes.acquire([1], drafts=True, cancellation=cancellation):
            pass
        assert turns.lanes.waiting == 0
