import random

import pytest

from fleet_edge.batching.batch_builder import Budget
from fleet_edge.batching.fairness import Extra
from fleet_edge.batching.steps import Batch
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.settings import PrefixSharing
from tests.support.drafts import arrived, draft
from tests.support.scheduled_edge import Edge, computed

SYSTEM = tuple(1 + place * place % 8 for place in range(500))
ALL = PrefixSharing.ALL


def prefilled(steps: list[Batch]) -> int:
    return sum(work.prefilled for batch in steps for work in batch.works)


def own(number: int) -> tuple[int, ...]:
    return tuple(1 + (number >> place) % 2 for place in range(9, -1, -1))


@pytest.mark.parametrize("tokens", [512, 100])
@pytest.mark.parametrize("drafting", [False, True])
def test_a_system_prompt_that_many_open_with_at_once_is_computed_once(tokens: int, drafting: bool) -> None:
    edge = Edge(Budget(tokens=tokens), sharing=ALL)
    begin = edge.drafting if drafting else edge.session
    sessions = [begin(prompt=(*SYSTEM, *own(number))) for number in range(32)]
    steps = edge.run()
    assert all(edge.scheduler._verifier.computed(session.handle) >= 509 for session in sessions)
    assert prefilled(steps) <= 500 + 32 * 9
    reused = [session.counters.reused_tokens for session in sessions]
    assert min(reused) == 0
    assert all(500 <= each <= 509 for each in sorted(reused)[1:]), "and taken over whole"
    assert all(session.counters.prefill_tokens + session.counters.reused_tokens == 509 for session in sessions)


def test_nothing_is_shared_where_that_is_off_or_with_other_devices() -> None:
    for sharing, times in [(PrefixSharing.OFF, 4), (PrefixSharing.DEVICE, 2)]:
        edge = Edge(sharing=sharing)
        for number in range(4):
            edge.session(prompt=SYSTEM, device=f"device-{number % 2}")
        assert prefilled(edge.run()) == pytest.approx(times * 499, abs=2)


def test_the_next_turn_of_a_conversation_computes_what_is_new() -> None:
    edge = Edge(sharing=ALL)
    text: tuple[int, ...] = SYSTEM[:100]
    for turn in range(5):
        session = edge.drafting(prompt=text, tokens=3)
        edge.run()
        assert session.counters.prefill_tokens == (99 if turn == 0 else 10)
        edge.sessions.remove(session)
        edge.scheduler.forget(session)
        text = (*session.tokens, *own(turn))


def test_a_session_that_is_resumed_goes_on_from_what_was_computed_before() -> None:
    edge = Edge(sharing=ALL)
    session = edge.drafting(prompt=SYSTEM[:100], tokens=3)
    edge.run()
    edge.sessions.remove(session)
    edge.scheduler.forget(session)
    again = edge.session(prompt=session.tokens)
    edge.run()
    assert again.counters.prefill_tokens == 0


def test_who_leaves_its_turn_to_another_leaves_it_no_more_than_what_both_begin_with() -> None:
    edge = Edge(Budget(tokens=150), sharing=ALL)
    long = edge.session(prompt=(*SYSTEM, *SYSTEM))
    edge.compute(edge.next_batch())
    short = edge.drafting(prompt=(*SYSTEM[:200], 9))
    batch = edge.next_batch()
    assert computed(batch) == {long.handle: 50}
    edge.compute(batch)
    assert short in edge.compute(edge.next_batch())
    assert short.counters.reused_tokens == 200


def test_a_session_that_cannot_go_on_holds_up_none_that_begin_alike() -> None:
    edge = Edge(Budget(tokens=100), sharing=ALL)
    first = edge.session(prompt=(*SYSTEM, 3))
    edge.compute(edge.next_batch())
    assert edge.scheduler._verifier.computed(first.handle) == 100
    second = edge.session(prompt=(*SYSTEM, 4))
    assert computed(edge.next_batch([second])) == {second.handle: 100}
    assert second.counters.reused_tokens == 100
    edge.scheduler.evict(first)
    third = edge.session(prompt=(*SYSTEM, 5))
    edge.compute(edge.next_batch([third]))
    assert edge.scheduler._verifier.computed(third.handle) > 100


@pytest.mark.parametrize("own_first", [False, True])
def test_a_prefix_counts_as_reused_once_however_often_it_is_evicted(own_first: bool) -> None:
    edge = Edge(sharing=ALL)
    if not own_first:
        edge.session(prompt=(*SYSTEM, 3))
        edge.run()
    session = edge.drafting(prompt=(*SYSTEM, 4))
    edge.run()
    edge.session(prompt=(*SYSTEM, 5))
    edge.run()
    first = session.counters.reused_tokens
    assert first == (0 if own_first else len(SYSTEM))
    for round_ in range(1, 4):
        edge.scheduler.evict(session)
        edge.again(session, at=edge.now, round_=round_)
        edge.run()
        assert edge.scheduler._verifier.computed(session.handle) > len(SYSTEM)
    assert session.counters.reused_tokens == first


def spend_credit(edge: Edge, device: str) -> None:
    edge.scheduler._extra.spend(device, Extra.PROMPTS, 100.0, edge.now)


def busy(edge: Edge) -> EdgeSession:
    """Let a device be verified, so that the background work of others waits."""
    writer = edge.drafting(device="writer", prompt=3)
    edge.run()
    edge.scheduler._extra.note_served(["writer"], edge.now)  # as if its last verdict were of this moment
    return writer


def test_a_device_without_credit_holds_up_nobody_and_its_prompt_is_computed_for_those_who_have_some() -> None:
    edge = Edge(Budget(tokens=512, prefill_chunk=100), sharing=ALL)
    busy(edge)
    spend_credit(edge, "poor")
    poor = edge.session(device="poor", prompt=(*SYSTEM, 3))
    rich = edge.session(device="rich", prompt=(*SYSTEM, 4))
    assert set(computed(edge.next_batch())) & {rich.handle}
    edge.run()
    assert prefilled([edge.next_batch()]) == 0
    assert poor.counters.prefill_tokens + rich.counters.prefill_tokens <= 520


def test_what_is_taken_over_needs_no_credit() -> None:
    edge = Edge(sharing=ALL)
    edge.session(device="rich", prompt=(*SYSTEM, 3))
    edge.run()
    busy(edge)
    spend_credit(edge, "poor")
    poor = edge.drafting(device="poor", prompt=SYSTEM, at=edge.now)
    (work,) = edge.next_batch().verifications
    assert (work.session, work.background) == (poor, False)


def test_what_a_step_was_to_compute_and_did_not_is_nobodys() -> None:
    edge = Edge(sharing=ALL)
    first = edge.session(prompt=(*SYSTEM, 3))
    second = edge.session(prompt=(*SYSTEM, 4))
    assert computed(edge.next_batch()) == {first.handle: 500}
    edge.scheduler.evict(first)  # as after a step that has failed
    assert computed(edge.next_batch()) == {second.handle: 500}


@pytest.mark.parametrize("seed", range(20))
def test_a_session_computes_exactly_its_text_whatever_is_taken_over(seed: int) -> None:
    """The scripted verifier keeps the tokens: they must be the session's own in every step, however short memory is."""
    rng = random.Random(seed)
    edge = Edge(Budget(tokens=rng.choice((20, 200))), kv_tokens=rng.choice((300, 900)), sharing=ALL)
    rounds: dict[int, int] = {}
    for number in range(60):
        if rng.random() < 0.5 and len(edge.sessions) < 8:
            cut = rng.choice((20, 60, 100))
            edge.session(prompt=(*SYSTEM[:cut], *own(rng.randrange(8))), device=f"device-{number % 3}")
        live = [session for session in edge.sessions if not session.finished]
        for session in rng.sample(live, min(2, len(live))):
            if session.ready is None:
                rounds[session.handle] = rounds.get(session.handle, -1) + 1
                text = session.tokens[session.prompt_length :]
                message = draft((4,), text=text, handle=session.handle, round_=rounds[session.handle])
                session.admit(arrived(message, at=float(number)))
        batch = edge.next_batch()
        edge.compute(batch)
        for work in batch.works:
            held = edge.scheduler._verifier._of(work.session.handle)
            known = work.session.tokens
            assert held.tokens.tolist()[: len(known) - 1] == known[: len(held.tokens)][: len(known) - 1]
        if edge.sessions and rng.random() < 0.3:
            edge.scheduler.forget(edge.sessions.pop(rng.randrange(len(edge.sessions))))
