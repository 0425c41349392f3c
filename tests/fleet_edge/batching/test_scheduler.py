import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from fleet_edge.batching.batch_builder import Budget
from fleet_edge.batching.steps import Batch, StepReport, StepTimes, WorkItem
from fleet_edge.errors import DraftFault
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.settings import PrefixSharing
from fleet_edge.verifiers.contract import Item, Verifier
from fleet_edge.verifiers.torch_engine.verifier import TorchVerifier
from sampling.verification import Judgement
from schemas.reasons import Action, FaultCode
from tests.fleet_edge.verifiers.oracle import tiny_target
from tests.support.drafts import LIMITS, arrived, draft, result
from tests.support.scheduled_edge import SCRIPT, Edge, computed
from tests.support.scripted_verifier import ScriptedVerifier


def test_prompt_and_draft_are_computed_in_one_step_where_both_fit() -> None:
    edge = Edge()
    session = edge.drafting(prompt=5, tokens=2)
    (work,) = edge.next_batch().works
    assert (work.item.tokens, work.item.rows) == ((1, 1, 1, 1, 1, 4, 4), 3)
    assert edge.compute(edge.next_batch()) == [session]


def test_the_last_token_of_a_draft_is_computed_with_the_next_draft_if_one_follows() -> None:
    edge = Edge()
    session = edge.session(prompt=3)
    session.admit(arrived(draft((4, 5), handle=session.handle, more=True)))
    batch = edge.next_batch()
    (work,) = batch.works
    assert (work.item.tokens, work.item.rows, work.prefilled) == ((1, 1, 1, 4), 2, 2)
    edge.scheduler.score(batch)
    session.settle(work.chain, Judgement(2, rejected=False))
    session.admit(arrived(draft((6, 7), handle=session.handle, text=(4, 5), round_=1)))
    (work,) = edge.next_batch().works
    assert (work.item.tokens, work.item.rows, work.prefilled) == ((5, 6, 7), 3, 0)


def test_the_prompt_is_computed_before_the_draft_arrives_all_but_its_last_token() -> None:
    edge = Edge()
    edge.session(prompt=5)
    batch = edge.next_batch()
    (item,) = batch.items
    assert (item.tokens, item.rows) == ((1, 1, 1, 1), 0)
    assert not batch.verifications
    edge.compute(batch)
    assert not edge.next_batch()


def test_verification_comes_before_prefill_and_the_oldest_draft_first() -> None:
    edge = Edge()
    edge.session()
    late, early = edge.drafting(at=2.0), edge.drafting(at=1.0)
    assert [work.session for work in edge.next_batch().works] == [early, late, edge.sessions[0]]


def test_a_long_prompt_takes_its_chunk_of_a_step_that_verifies_and_a_whole_step_otherwise() -> None:
    edge = Edge(Budget(tokens=50, prefill_chunk=10))
    edge.session(prompt=200)
    assert computed(edge.next_batch()) == {0: 50}
    edge.drafting(prompt=3, tokens=2)
    assert computed(edge.next_batch()) == {1: 5, 0: 10}


def test_a_step_exceeds_its_budget_by_no_more_than_a_draft() -> None:
    edge = Edge(Budget(tokens=16))
    for _ in range(20):
        edge.drafting(prompt=3, tokens=4)
    while batch := edge.next_batch():
        assert sum(computed(batch).values()) <= 16 + 1 + LIMITS.max_draft
        edge.compute(batch)


def test_a_device_takes_no_more_than_its_share_while_others_wait() -> None:
    edge = Edge(Budget(tokens=20, device_share=0.5))
    greedy = [edge.drafting(at=float(number), device="greedy", prompt=3, tokens=2) for number in range(4)]
    other = edge.drafting(at=9.0, device="other", prompt=3, tokens=2)
    assert edge.compute(edge.next_batch()) == [*greedy[:2], other]


def test_a_long_backlog_is_computed_in_parts_while_others_are_served() -> None:
    edge = Edge(Budget(tokens=20))
    long = edge.drafting(at=0.0, prompt=95)
    served = []
    for round_ in range(12):
        short = edge.drafting(at=1.0 + round_)
        verdicts = edge.compute(edge.next_batch())
        assert short in verdicts
        served += verdicts
    assert long in served


def test_prompts_together_take_one_chunk_of_a_step_that_verifies() -> None:
    edge = Edge(Budget(tokens=100, prefill_chunk=10))
    for _ in range(5):
        edge.session(prompt=200)
    verified = edge.drafting(prompt=3, tokens=2)
    batch = edge.next_batch()
    assert [work.session for work in batch.verifications] == [verified]
    assert sum(len(work.item.tokens) for work in batch.works if not work.chain) == 10


def test_a_draft_that_waits_for_its_own_prompt_takes_no_more_of_a_step_than_a_prompt() -> None:
    edge = Edge(Budget(tokens=200, prefill_chunk=20))
    long = [edge.drafting(at=float(number), device=f"long-{number}", prompt=150) for number in range(3)]
    short = edge.drafting(at=9.0, device="short", prompt=3, tokens=2)
    batch = edge.next_batch()
    parts = computed(batch)
    assert [work.session for work in batch.verifications] == [short]
    assert sum(parts[session.handle] for session in long if session.handle in parts) == 20
    # The oldest comes first, and all are served although others are verified in every step.
    assert parts[long[0].handle] == 10
    served = list(edge.compute(batch))
    for number in range(60):
        edge.drafting(at=10.0 + number, device="short", prompt=3, tokens=2)
        served += edge.compute(edge.next_batch())
    assert all(session in served for session in long)


def test_many_drafts_leave_a_prompt_with_a_draft_its_chunk() -> None:
    edge = Edge(Budget(tokens=40, prefill_chunk=10, device_share=1.0))
    long = edge.drafting(at=0.0, device="long", prompt=100)
    for number in range(30):
        edge.drafting(at=1.0 + number, device=f"short-{number}", prompt=3, tokens=2)
    assert computed(edge.next_batch())[long.handle] == 10


def test_prompts_without_end_wait_for_those_who_draft() -> None:
    """Ten prompts of 900 tokens, computed repeatedly, next to one drafting device; a token takes a millisecond."""
    edge = Edge(Budget(tokens=128, prefill_chunk=128))
    prompts = [edge.session(device="hostile", prompt=900) for _ in range(10)]
    seconds = {"honest": 0.0, "hostile": 0.0}
    for _ in range(1500):
        writer = edge.drafting(device="honest", prompt=3, tokens=2)
        batch = edge.next_batch([*prompts, writer])
        parts = computed(batch)
        assert edge.compute(batch) == [writer]
        step = StepTimes(edge.now, edge.now + 1e-3 * sum(parts.values()), sessions=1)
        edge.scheduler.on_step(StepReport(batch, step))
        edge.scheduler.on_commit(batch.verifications[0], committed=3)
        edge.now = step.ended
        seconds["honest"] += 1e-3 * parts.pop(writer.handle)
        seconds["hostile"] += 1e-3 * sum(parts.values())
        for session in prompts:
            if edge.verifier.computed(session.handle) >= 899:
                edge.scheduler.evict(session)
    burst_s = 1.0 + 2 * 0.128  # and the chunks that it, and the last of the share, end in
    assert seconds["hostile"] - burst_s < 0.36 * edge.now


def test_no_prompt_delays_those_who_draft_by_more_than_a_chunk_even_while_none_of_their_drafts_is_here() -> None:
    edge = Edge(Budget(tokens=50, prefill_chunk=10))
    writer = edge.drafting()
    batch = edge.next_batch()
    assert edge.compute(batch) == [writer]
    edge.scheduler.on_step(StepReport(batch, StepTimes(0.0, 1e-3, sessions=1)))
    edge.scheduler.expect_draft(writer, at=0.1)
    edge.now = 0.1
    long = edge.session(prompt=200)
    assert computed(edge.next_batch()) == {long.handle: 10}
    edge.now = 9.0
    assert computed(edge.next_batch()) == {long.handle: 50}


def _served(*, turnaround_s: float, prompt: int, seconds: float = 30.0, devices: int = 3) -> tuple[int, float, int]:
    """Let devices draft at an edge that takes 10 ms per token, while another device has opened a long session.

    Returns:
        The devices' verdicts, their longest wait for one, and the computed tokens of the prompt.
    """
    edge = Edge(token_s=0.0)
    limits = replace(LIMITS, max_new_tokens=2000)
    writers = [edge.session(device=f"honest-{number}", limits=limits) for number in range(devices)]
    due = {writer.handle: turnaround_s * (1 + number) / devices for number, writer in enumerate(writers)}
    arrived_at: dict[int, float] = {}
    rounds, verdicts, longest = Counter[int](), 0, 0.0
    long = edge.session(device="hostile", prompt=prompt) if prompt else None
    while edge.now < seconds:
        for writer in writers:
            if (at := due.get(writer.handle, math.inf)) <= edge.now:
                del due[writer.handle]
                arrived_at[writer.handle] = at
                rounds[writer.handle] += 1
                edge.again(writer, at=at, round_=rounds[writer.handle])
                edge.scheduler.on_draft(writer, at=at)
        batch = edge.next_batch()
        if not batch:
            edge.now = max(edge.now + 1e-3, min(due.values(), default=seconds))
            continue
        step = StepTimes(edge.now, edge.now + 0.05 + 0.01 * sum(computed(batch).values()), len(batch.verifications))
        edge.now = step.ended
        answered = edge.compute(batch)
        edge.scheduler.on_step(StepReport(batch, step))
        for work in batch.verifications:
            edge.scheduler.on_commit(work, committed=2)
        for writer in answered:
            edge.scheduler.expect_draft(writer, at=edge.now)
            verdicts += 1
            longest = max(longest, edge.now - arrived_at.pop(writer.handle))
            due[writer.handle] = edge.now + turnaround_s
    return verdicts, longest, 0 if long is None else edge.verifier.computed(long.handle)


@pytest.mark.parametrize("turnaround_s", [0.05, 0.4, 1.5])
def test_a_long_prompt_on_a_slow_edge_leaves_those_who_draft_their_pace(turnaround_s: float) -> None:
    alone, usual_s, _ = _served(turnaround_s=turnaround_s, prompt=0)
    beside, longest_s, _ = _served(turnaround_s=turnaround_s, prompt=8000)
    assert beside >= 0.7 * alone, "a quarter of the time is the credit of the other device"
    assert longest_s <= usual_s + 0.6, "a prompt's chunk that has just begun, and one in the verdict's own step"


def _short_texts(*, devices: int, turnaround_s: float, pause_s: float, long: int, seconds: float = 20.0) -> int:
    """Let devices open one short session after another, while another device has opened `long` sessions at once.

    A step takes 30 ms and 2 ms a token. Returns the devices' verdicts.
    """
    edge = Edge(token_s=0.0)
    for _ in range(long):
        edge.session(device="hostile", prompt=4092)
    writing: dict[str, EdgeSession] = {}
    due = {f"honest-{number}": pause_s * (1 + number) / devices for number in range(devices)}
    rounds, verdicts = Counter[str](), 0
    while edge.now < seconds:
        for device in [device for device, at in due.items() if at <= edge.now]:
            at = due.pop(device)
            if device in writing:
                edge.again(writing[device], at=at, round_=rounds[device])
                edge.scheduler.on_draft(writing[device], at=at)
            else:
                writing[device], rounds[device] = edge.session(device=device, prompt=60), 0
                due[device] = at + turnaround_s
        batch = edge.next_batch()
        if not batch:
            edge.now = max(edge.now + 1e-3, min(due.values(), default=seconds))
            continue
        step = StepTimes(edge.now, edge.now + 0.03 + 2e-3 * sum(computed(batch).values()), len(batch.verifications))
        edge.now = step.ended
        answered = edge.compute(batch)
        edge.scheduler.on_step(StepReport(batch, step))
        for work in batch.verifications:
            edge.scheduler.on_commit(work, committed=2)
        for session in answered:
            verdicts += 1
            rounds[session.device] += 1
            if rounds[session.device] < 6:
                edge.scheduler.expect_draft(session, at=edge.now)
                due[session.device] = edge.now + turnaround_s
            else:
                edge.scheduler.forget(session)
                edge.sessions.remove(writing.pop(session.device))
                due[session.device] = edge.now + pause_s
    return verdicts


@pytest.mark.parametrize(("devices", "turnaround_s", "pause_s"), [(1, 0.03, 0.03), (1, 0.05, 0.3), (3, 0.08, 0.03)])
def test_long_opens_leave_short_texts_their_pace(devices: int, turnaround_s: float, pause_s: float) -> None:
    alone = _short_texts(devices=devices, turnaround_s=turnaround_s, pause_s=pause_s, long=0)
    beside = _short_texts(devices=devices, turnaround_s=turnaround_s, pause_s=pause_s, long=4)
    assert beside >= 0.7 * alone


def test_a_long_prompt_is_computed_while_those_who_draft_leave_the_edge_nothing_to_do() -> None:
    _, _, tokens = _served(turnaround_s=1.5, prompt=8000, devices=1)
    assert tokens > 1500, "the edge is idle for nine tenths of the time"


def test_what_a_step_brings_is_not_taken_for_what_the_next_one_brings() -> None:
    """Edge-only steps of two requests, a token each, alternate with verifying steps that accept all eight tokens."""
    edge = Edge()
    texts = [edge.session(device=f"device-{number}") for number in range(2)]
    written, drafted = (arrived(draft((), counted=False, write=9)),), (arrived(draft((1,) * 8)),)
    for number in range(50):
        verifies = number % 2 == 0
        tokens, step_s = (9, 0.2) if verifies else (1, 0.05)
        chain = drafted if verifies else written
        works = [WorkItem(text, Item(text.handle, (1,) * tokens, tokens), chain) for text in texts]
        edge.scheduler.on_step(StepReport(Batch(works), StepTimes(edge.now, edge.now + step_s, sessions=2)))
        for work in works:
            edge.scheduler.on_commit(work, committed=tokens)
        edge.now += step_s
    assert edge.scheduler.load().writing_ms == pytest.approx(50.0)


def test_drafts_that_are_never_accepted_wait_for_others() -> None:
    edge = Edge()
    honest = edge.drafting(at=1.0, device="honest")
    hostile = edge.drafting(at=0.0, device="hostile", tokens=4)
    for _ in range(40):
        edge.scheduler.on_commit(WorkItem(hostile, Item(hostile.handle, (1,), 5), ()), committed=0)
    edge.scheduler.on_step(StepReport(edge.next_batch([honest]), StepTimes(started=0.0, ended=0.1, sessions=1)))
    hostile_at_all = 0
    for number in range(50):
        edge.now += 0.02
        batch = edge.next_batch()
        hostile_at_all += any(work.session is hostile for work in batch.works)
        edge.scheduler.on_step(StepReport(batch, StepTimes(started=edge.now - 0.02, ended=edge.now, sessions=number)))
    assert 1 <= hostile_at_all < 15
    edge.now += 10.0
    assert [work.session for work in edge.next_batch([hostile]).works] == [hostile], "alone it does not wait"


def test_who_holds_more_keys_and_values_than_his_share_makes_room_first() -> None:
    edge = Edge(kv_tokens=100, kv_share=lambda _device: 0.5)
    honest = edge.drafting(at=0.0, device="honest", prompt=20)
    edge.compute(edge.next_batch([honest]))
    for number in range(3):
        session = edge.drafting(at=1.0 + number, device="hostile", prompt=22)
        edge.compute(edge.next_batch([honest, session]))
    newcomer = edge.drafting(at=9.0, device="newcomer", prompt=22)
    edge.compute(edge.next_batch())
    assert edge.verifier.computed(honest.handle) > 0, "the one unused for longest, but within its share"
    assert edge.verifier.computed(newcomer.handle) > 0


def test_what_a_rejection_left_behind_is_forgotten_before_the_next_draft() -> None:
    edge = Edge()
    session = edge.drafting(prompt=3, tokens=2)
    batch = edge.next_batch()
    edge.scheduler.score(batch)
    session.settle(batch.works[0].chain, Judgement(0, rejected=True, token=7))
    session.admit(arrived(draft((8,), text=(7,), handle=0, round_=1, epoch=1)))
    (item,) = edge.next_batch().items
    assert item.tokens == (7, 8)
    assert edge.verifier.computed(0) == 3


def test_a_draft_that_is_void_in_its_turn_is_reported_and_holds_up_nobody() -> None:
    edge = Edge()
    wrong, right = edge.session(), edge.drafting()
    wrong.admit(arrived(draft((4,), text=(9,), handle=0, round_=1)))
    wrong._extend((8,))  # as if a verdict had put another token there
    batch = edge.next_batch()
    assert [(session, message.round) for session, message, _ in batch.faults] == [(wrong, 1)]
    assert edge.compute(batch) == [right]


def test_the_session_unused_for_longest_is_evicted() -> None:
    edge = Edge(kv_tokens=20)
    old, new = edge.session(prompt=8), edge.session(prompt=8)
    edge.compute(edge.next_batch([old]))
    edge.compute(edge.next_batch([new]))
    edge.again(old, at=0.0, round_=0)
    edge.compute(edge.next_batch())  # now `new` is the one unused for longest
    edge.drafting(prompt=8)
    edge.compute(edge.next_batch())
    assert (edge.verifier.computed(new.handle), edge.verifier.computed(old.handle)) == (0, 9)


def test_sessions_that_do_not_all_fit_do_not_evict_each_other_while_none_drafts() -> None:
    edge = Edge(kv_tokens=12)
    sessions = [edge.session(prompt=9), edge.session(prompt=9)]
    for _ in sessions:
        edge.compute(edge.next_batch())
    assert not edge.next_batch()
    edge.again(sessions[0], at=0.0, round_=0)
    assert edge.compute(edge.next_batch()) == sessions[:1]


def test_computing_an_evicted_text_anew_is_no_queue_time() -> None:
    edge = Edge(Budget(tokens=10))
    session = edge.session(prompt=25)
    while batch := edge.next_batch():
        edge.compute(batch)
    edge.scheduler.evict(session)
    edge.again(session, at=1.0, round_=0)
    now = 3.0
    while not (batch := edge.next_batch()).verifications:
        edge.scheduler.score(batch)
        edge.scheduler.on_step(StepReport(batch, StepTimes(now, now + 1.0, sessions=0)))
        now += 1.0
    assert now > 3.0
    (work,) = batch.verifications
    (timing,) = edge.scheduler.timed(work, [result(work.chain[0])], StepTimes(now, now + 1.0, sessions=1)).results
    assert (timing.queue_ms, timing.prefill_ms) == (2000.0, (now - 3.0) * 1e3)


def test_a_verdict_says_how_many_tokens_of_other_drafts_of_its_session_the_step_has_verified() -> None:
    edge = Edge()
    session = edge.session(prompt=5)
    edge.compute(edge.next_batch())
    for sent in (draft((4, 5), handle=session.handle, more=True), draft((6,), text=(4, 5), round_=1)):
        session.admit(arrived(sent))
    (work,) = edge.next_batch().verifications
    step = StepTimes(0.0, 1.0, sessions=1)
    timed = edge.scheduler.timed(work, [result(each) for each in work.chain], step)
    assert [each.chained for each in timed.results] == [1, 2]


def test_where_two_drafts_do_not_fit_the_older_one_is_verified_and_the_other_evicted() -> None:
    edge = Edge(kv_tokens=20)
    sessions = [edge.session(prompt=9), edge.session(prompt=9)]
    for session in sessions:
        edge.compute(edge.next_batch([session]))
    for at, session in enumerate(sessions):
        session.admit(arrived(draft((4,) * 4, handle=session.handle), at=float(at)))
    for session in sessions:
        assert edge.compute(edge.next_batch()) == [session]


def test_an_ended_session_is_forgotten() -> None:
    edge = Edge()
    session = edge.drafting()
    room = edge.verifier.capacity()
    edge.compute(edge.next_batch())
    assert edge.verifier.capacity() < room
    edge.scheduler.forget(session)
    assert edge.verifier.capacity() == room
    assert edge.scheduler._used == {}


def scripted(rng: random.Random) -> Verifier:
    return ScriptedVerifier(SCRIPT, SCRIPT.words, budget_tokens=rng.choice((45, 90, 1000)))


def packed(rng: random.Random) -> Verifier:
    return TorchVerifier(tiny_target("llama"), budget_bytes=rng.choice((350_000, 442_368, 1_000_000)))


@pytest.mark.parametrize(
    ("seed", "make"), [*((seed, scripted) for seed in range(15)), *((seed, packed) for seed in range(2))]
)
def test_every_ready_session_is_served_soon(seed: int, make: Callable[[random.Random], Verifier]) -> None:
    """Sessions draft again at once, memory is short, prompts are long: no session starves."""
    rng = random.Random(seed)
    sharing = rng.choice([*PrefixSharing])
    edge = Edge(Budget(tokens=rng.choice((1, 7, 32)), prefill_chunk=4), verifier=make(rng), sharing=sharing)
    count = rng.randint(2, 6) if make is scripted else 12
    for _ in range(count):
        session = edge.session(device=f"device-{rng.randint(0, 2)}", prompt=rng.randint(1, 20))
        session.admit(arrived(draft((4,) * rng.randint(0, 4), handle=session.handle), at=0.0))
    waiting = dict.fromkeys(range(count), 0)
    rounds = dict.fromkeys(range(count), 0)
    # At worst everything is computed again, a token per step, for every earlier session.
    bound = 60 * count
    for step in range(400):
        for session in edge.compute(edge.next_batch()):
            waiting[session.handle] = -1
            rounds[session.handle] += 1
            if session.finished:
                continue
            edge.again(session, at=float(step), round_=rounds[session.handle])
        for handle in waiting:
            waiting[handle] = 0 if edge.sessions[handle].finished else waiting[handle] + 1
            assert waiting[handle] < bound
    assert all(rounds.values())


def test_a_step_is_held_for_a_session_that_goes_on_and_not_for_one_that_has_ended() -> None:
    edge = Edge()
    going_on, ended = edge.session(), edge.session()
    edge.drafting()  # the draft that is ready, and would be held
    edge.scheduler.on_step(StepReport(edge.next_batch(), StepTimes(started=0.0, ended=0.1, sessions=1)))
    for session in (going_on, ended):
        edge.scheduler.expect_draft(session, at=0.0)
        edge.scheduler.on_draft(session, at=0.004)
    assert edge.scheduler.hold_s(edge.sessions, now=10.0) == 0.0
    ended.fail(DraftFault(FaultCode.INTERNAL, Action.GIVE_UP, "It has ended."))
    edge.scheduler.expect_draft(ended, at=10.0)
    assert edge.scheduler.hold_s(edge.sessions, now=10.0) == 0.0
    edge.scheduler.expect_draft(going_on, at=10.0)
    assert edge.scheduler.hold_s(edge.sessions, now=10.0) == pytest.approx(0.005)


def served_in_order(edge: Edge, *, until: int, arrivals: dict[int, Callable[[], EdgeSession]]) -> list[int]:
    """Run steps, in which drafts arrive at their numbers, until so many sessions have a verdict and have ended."""
    served: list[int] = []
    step = 0
    while len(served) < until:
        assert step < 5000
        if step in arrivals:
            arrivals[step]()
        edge.next_batch()  # an edge may look more than once before it computes
        batch = edge.next_batch()
        ended = edge.compute(batch)
        times = StepTimes(edge.now, edge.now + 1e-3 * batch.tokens, sessions=len(ended))
        edge.scheduler.on_step(StepReport(batch, times))
        edge.now = times.ended
        step += 1
        for session in ended:
            served.append(session.handle)
            edge.sessions.remove(session)
            edge.scheduler.forget(session)
    return served


def long_prompts(count: int, *, kv_tokens: int) -> Edge:
    """Edge with prompts of 400 tokens; a step computes 40 tokens, in 40 ms."""
    edge = Edge(Budget(tokens=40, prefill_chunk=40, device_share=1.0), kv_tokens=kv_tokens, token_s=0.001)
    for _ in range(count):
        edge.drafting(prompt=400)
    return edge


@pytest.mark.parametrize("kv_tokens", [1000, 10_000])
def test_a_short_prompt_does_not_wait_for_all_long_ones(kv_tokens: int) -> None:
    edge = long_prompts(20, kv_tokens=kv_tokens)
    arrivals = {number: lambda: edge.drafting(at=edge.now, prompt=20) for number in (60, 61, 150)}
    served = served_in_order(edge, until=23, arrivals=arrivals)
    first, second, third = (served.index(handle) for handle in (20, 21, 22))
    assert second - 6 <= first < second <= 8  # five or six long ones were before
    assert third <= 18
    assert sorted(served) == list(range(23))


def test_long_prompts_are_not_computed_again_where_some_of_them_fill_memory() -> None:
    edge = long_prompts(8, kv_tokens=1000)
    served_in_order(edge, until=8, arrivals={})
    assert edge.now <= 8 * 0.403 + 0.1


def test_a_long_prompt_does_not_wait_for_short_ones_without_end() -> None:
    edge = long_prompts(1, kv_tokens=1000)
    arrivals = {number: lambda: edge.drafting(at=edge.now, prompt=100) for number in range(1, 2000, 2)}
    served = served_in_order(edge, until=40, arrivals=arrivals)
    assert served.index(0) <= 24  # its lead of four times its own time, then half of the steps
