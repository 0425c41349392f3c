import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from fleet_device.pacing.contract import FixedPacing, Pacing
from fleet_edge.batching.fairness import Extra, ExtraWork, MemoryTurns
from fleet_edge.batching.step_cost import StepCost
from fleet_edge.batching.steps import StepReport, StepTimes
from fleet_edge.sessions.grammars import MAX_FORCED, Constraint
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.settings import PrefixSharing
from fleet_edge.verifiers.contract import Item, Logits
from schemas.policy import Mode
from tests.support.drafts import LIMITS, arrived, draft, step_report
from tests.support.memory_fleet import Device, MemoryFleet, lossless_text, terms
from tests.support.scheduled_edge import SCRIPT, Edge
from tests.support.scripted_verifier import ScriptedVerifier

STEP_S = 0.04


def pass_step(extra: ExtraWork, now: float, seconds: float = STEP_S, *, served: Sequence[str] = ()) -> float:
    """Let a step without extra work pass, after which these devices have their verdicts; return its end."""
    extra.on_step(step_report({1: 1}, step_s=seconds, at=now + seconds), StepCost())
    extra.note_served(served, now + seconds)
    return now + seconds


@pytest.mark.parametrize("kind", list(Extra))
@pytest.mark.parametrize("devices", [1, 2, 5])
def test_extra_work_gets_its_share_of_the_time_while_others_are_served(kind: Extra, devices: int) -> None:
    extra, now = ExtraWork(), 0.0
    greedy = [f"device-{number}" for number in range(devices)]
    used = dict.fromkeys(greedy, 0.0)
    while now < 200.0:
        able = [device for device in greedy if not extra.waits(device, kind, now)]
        now = pass_step(extra, now, STEP_S + 0.1 * len(able), served=["other"])
        for device in able:
            extra.spend(device, kind, 0.1, now)
            used[device] += 0.1
    share = max(1 / 3, devices * min(1 / 3, 1 / (devices + 1))) if kind is Extra.PROMPTS else 0.2
    assert sum(used.values()) / now == pytest.approx(share, rel=0.15)
    assert min(used.values()) > 0.9 * max(used.values())


def test_what_a_device_does_not_need_of_the_budget_is_for_the_others() -> None:
    extra, now, used = ExtraWork(), 0.0, 0.0
    while now < 100.0:
        waits = extra.waits("greedy", Extra.GRAMMAR, now)
        now = pass_step(extra, now, STEP_S + (0.0 if waits else 0.1), served=["other"])
        for modest in range(4):
            extra.spend(f"modest-{modest}", Extra.GRAMMAR, 0.01 * STEP_S, now)
            assert not extra.waits(f"modest-{modest}", Extra.GRAMMAR, now)
        if not waits:
            extra.spend("greedy", Extra.GRAMMAR, 0.1, now)
            used += 0.1
    assert used / now > 0.12, "a fifth, without the 3 % of the others"


def test_nothing_waits_and_nothing_counts_while_no_other_device_is_served() -> None:
    extra = ExtraWork()
    now = pass_step(extra, 0.0, served=["a"])
    for kind in Extra:
        extra.spend("a", kind, 100.0, now)
        assert not extra.waits("a", kind, now)
    assert extra.max_forced("a", 1000, now) == MAX_FORCED
    now = pass_step(extra, now, served=["b"])
    assert not any(extra.waits("a", kind, now) for kind in Extra)


def test_work_that_waits_goes_on_once_the_others_have_fallen_silent() -> None:
    extra = ExtraWork()
    now = pass_step(extra, 0.0, served=["b"])
    extra.spend("a", Extra.PROMPTS, 100.0, now)
    assert extra.waits("a", Extra.PROMPTS, now)
    assert not extra.waits("a", Extra.PROMPTS, now + 1.0)


def test_devices_whose_grammars_all_use_much_do_not_wait_for_each_other() -> None:
    extra, now = ExtraWork(), 0.0
    for _ in range(100):
        now = pass_step(extra, now, served=["a", "b"])
        extra.spend("a", Extra.GRAMMAR, 0.1, now)
        extra.spend("b", Extra.GRAMMAR, 0.1, now)
    now = pass_step(extra, now, served=["a", "b"])
    assert not (extra.waits("a", Extra.GRAMMAR, now) and extra.waits("b", Extra.GRAMMAR, now))


def test_work_in_the_background_costs_nothing_and_pays_nothing_back() -> None:
    extra = ExtraWork()
    now = pass_step(extra, 0.0, served=["b"])
    extra.spend("a", Extra.PROMPTS, 2.0, now)
    for _ in range(1000):
        extra.on_step(step_report({2: 5}, step_s=STEP_S, at=now, background={2}), StepCost())
    extra.note_served(["b"], now)
    assert extra.waits("a", Extra.PROMPTS, now)


def test_work_that_waits_may_take_a_fraction_of_the_silence_of_others() -> None:
    extra = ExtraWork()
    assert extra.quiet_s(["a"], 0.0) == math.inf, "nobody else is served"
    extra.note_served(["b"], 1.0)
    extra.note_served(["a"], 1.1)
    assert 0.0 < extra.quiet_s(["a"], 1.2) < 0.1
    assert extra.quiet_s(["b", "c"], 1.2) < extra.quiet_s(["a"], 1.2)
    assert extra.quiet_s(["a", "b"], 1.2) == math.inf, "all who are served wait"


def test_who_drafts_much_for_nothing_is_wasteful_until_that_is_forgotten() -> None:
    work = ExtraWork()
    work.count_drafts("device-1", computed=17, committed=1)
    assert not work.wasteful("device-1"), "a few drafts say nothing"
    for _ in range(10):
        work.count_drafts("device-1", computed=17, committed=1)
    assert work.wasteful("device-1")
    assert not work.wasteful("device-2")
    assert [work.longest_draft("device-1", most) for most in (2, 16)] == [2, 4]
    assert work.longest_draft("device-2", 16) == 16
    for _ in range(100):
        work.count_drafts("device-1", computed=5, committed=3)
    assert not work.wasteful("device-1")


def test_long_drafts_that_are_often_accepted_are_none() -> None:
    work = ExtraWork()
    for _ in range(100):
        work.count_drafts("device-1", computed=17, committed=4)
    assert not work.wasteful("device-1")


def test_what_is_known_of_devices_is_forgotten_with_what_they_used() -> None:
    extra, now = ExtraWork(), 0.0
    for number in range(1000):
        now = pass_step(extra, now, 1.0, served=["other", f"device-{number}"])
        extra.spend(f"device-{number}", Extra.GRAMMAR, 0.01, now)
    assert len(extra._deficits) < 10
    assert len(extra._served) < 10


@dataclass(frozen=True)
class Machine:
    """Seconds of a step, of each session in it, of each further row, and of each token of a prompt."""

    step_s: float
    session_s: float
    row_s: float
    prompt_s: float


SMALL = Machine(0.004, 0.004, 0.0035, 0.004)  # a target of 135M parameters
LARGE = Machine(0.09, 0.008, 0.0075, 0.011)  # 7B on two cores


class Forcing(Constraint):
    """A grammar that forces every token, or none; a mask takes two milliseconds."""

    def __init__(self, *, all_tokens: bool) -> None:
        super().__init__(matcher=None)  # type: ignore[arg-type]
        self.all_tokens = all_tokens

    def next_forced(self, text: Sequence[int], most: int) -> tuple[int, ...]:
        del text
        return (4,) * most if self.all_tokens else ()

    def mask(self, rows: int) -> float:
        self._spent_s += 0.002 * rows
        return 0.002 * rows


def compute_step(edge: Edge, machine: Machine) -> float:
    """Compute the next step, if there is work; return what it took."""
    batch = edge.next_batch()
    if not batch:
        edge.now += 1e-3
        return 0.0
    rows = sum(work.verified - 1 for work in batch.verifications)
    took_s = machine.step_s + machine.session_s * len(batch.works) + machine.row_s * rows
    took_s += machine.prompt_s * batch.prefilled
    for work in batch.verifications:
        if isinstance(constraint := work.session.constraint, Forcing):
            took_s += constraint.mask(work.item.rows)
    edge.compute(batch)
    times = StepTimes(edge.now, edge.now + took_s, len(batch.verifications))
    edge.scheduler.on_step(StepReport(batch, times))
    edge.now = times.ended
    return took_s


def decoding(
    edge: Edge, device: str, *, grammar: Constraint | None = None, prompt: int | Sequence[int] = 3
) -> EdgeSession:
    session = edge.session(device=device, prompt=prompt, limits=replace(LIMITS, max_new_tokens=1 << 20))
    session.constraint = grammar
    session.admit(arrived(draft((), handle=session.handle, write=1 << 17), at=edge.now))
    return session


def honest_tokens(machine: Machine, *, attackers: int, forced: bool, masked: bool = False) -> int:
    """Return what three devices decode next to others with four requests each, in 200 plain steps of the machine."""
    edge = Edge(token_s=0.0)
    honest = [
        decoding(edge, f"honest-{number}", grammar=Forcing(all_tokens=False) if masked else None) for number in range(3)
    ]
    hostile = [
        decoding(edge, f"hostile-{number}", grammar=Forcing(all_tokens=True) if forced else None)
        for number in range(attackers)
        for _ in range(4)
    ]
    seconds = 200 * (machine.step_s + machine.session_s * len(edge.sessions))
    while edge.now < seconds:
        compute_step(edge, machine)
    assert all(session.committed > 10 for session in hostile)
    return sum(session.committed for session in honest)


@pytest.mark.parametrize("machine", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("attackers", [1, 2, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_forced_text_leaves_the_others_most_of_what_plain_requests_leave_them(
    machine: Machine, attackers: int, *, masked: bool
) -> None:
    plain = honest_tokens(machine, attackers=attackers, forced=False, masked=masked)
    assert honest_tokens(machine, attackers=attackers, forced=True, masked=masked) >= 0.75 * plain


def test_forced_rows_of_a_step_are_bounded_for_all_devices_together() -> None:
    edge = Edge()
    for device in ("a", "b", "c"):
        decoding(edge, device, grammar=Forcing(all_tokens=True))
    longest = 0
    while edge.now < 5.0:
        if edge.now > 1.0:  # once the cost of a row is known
            longest = max(longest, sum(work.speculated for work in edge.next_batch().works))
        compute_step(edge, SMALL)
    assert 0 < longest < MAX_FORCED, "two steps of 16 ms"


@pytest.mark.parametrize("machine", [SMALL, LARGE], ids=["small", "large"])
def test_long_prompts_of_several_devices_leave_the_others_their_part_and_are_computed(machine: Machine) -> None:
    edge = Edge(token_s=0.0)
    honest = [decoding(edge, f"honest-{number}") for number in range(2)]
    long = [decoding(edge, f"long-{number}", prompt=3000) for number in range(4)]
    steps_s = list[float]()
    while any(session.committed == 0 for session in long):
        steps_s.append(compute_step(edge, machine))
    alone_s = machine.step_s + 2 * machine.session_s
    assert sum(session.committed for session in honest) > 0.28 * 2 * edge.now / alone_s, "a third of the time"
    assert max(steps_s) < 0.3 + 2 * alone_s


def long_context_edge(*, sharing: PrefixSharing = PrefixSharing.OFF) -> Edge:
    verifier = ScriptedVerifier(SCRIPT, SCRIPT.words, budget_tokens=1 << 20, context=1 << 16)
    return Edge(token_s=0.0, verifier=verifier, sharing=sharing)


@pytest.mark.parametrize("machine", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("chats", [1, 4, 12])
def test_a_long_prompt_at_most_doubles_the_time_between_tokens_of_others_and_is_computed(
    machine: Machine, chats: int
) -> None:
    edge = long_context_edge()
    running = [decoding(edge, f"chat-{number}") for number in range(chats)]
    while edge.now < 5.0:
        compute_step(edge, machine)
    long, began = decoding(edge, "long", prompt=4000), edge.now
    gaps_s = list[float]()
    while not long.committed:
        committed = running[0].committed
        took_s = compute_step(edge, machine)
        assert running[0].committed == committed + 1
        gaps_s.append(took_s)
    usual_s = machine.step_s + chats * machine.session_s
    p95_s = sorted(gaps_s)[math.ceil(0.95 * len(gaps_s)) - 1]
    assert p95_s <= 2.01 * usual_s
    assert len(gaps_s) * usual_s > 0.6 * (edge.now - began), "the pace of the others"
    assert edge.now - began < 6.0 * 4000 * machine.prompt_s


@pytest.mark.parametrize("machine", [SMALL, LARGE], ids=["small", "large"])
def test_a_device_is_charged_for_the_time_that_its_prompts_add(machine: Machine) -> None:
    edge = long_context_edge()
    for number in range(4):
        decoding(edge, f"chat-{number}")
    while edge.now < 5.0:
        compute_step(edge, machine)
    long = decoding(edge, "long", prompt=2000)
    while not long.committed:
        compute_step(edge, machine)
    # Being in a step has a price too.
    assert 0.9 < edge.prompt_s["long"] / (2000 * machine.prompt_s) < 2.5


@pytest.mark.parametrize("machine", [SMALL, LARGE], ids=["small", "large"])
def test_a_short_prompt_does_not_wait_for_long_ones_that_came_before(machine: Machine) -> None:
    edge = long_context_edge()
    long = [decoding(edge, f"long-{number}", prompt=4000) for number in range(4)]
    while edge.now < 5.0:
        compute_step(edge, machine)
    short, began = decoding(edge, "short", prompt=100), edge.now
    while not short.committed:
        compute_step(edge, machine)
    assert edge.now - began < 4.0, "FIFO: four times 16 to 44 s"
    assert not any(session.committed for session in long)


def test_a_long_prompt_is_computed_next_to_short_ones_without_end() -> None:
    edge = long_context_edge()
    while edge.now < 2.0:  # so that the cost of a token is known
        decoding(edge, "first", prompt=200)
        compute_step(edge, LARGE)
    long, began, number = decoding(edge, "long", prompt=1000), edge.now, 0
    while not long.committed:
        for session in [session for session in edge.sessions if session is not long and session.committed]:
            edge.sessions.remove(session)
        while sum(not session.committed for session in edge.sessions) < 20:
            number += 1
            decoding(edge, f"short-{number}", prompt=100)
        compute_step(edge, LARGE)
    assert edge.now - began < 20 * 1000 * LARGE.prompt_s


def test_a_prompt_is_computed_at_once_next_to_devices_whose_prompts_wait() -> None:
    edge = Edge(token_s=0.0)
    for number in range(4):
        decoding(edge, f"long-{number}", prompt=4000)
    decoding(edge, "honest")
    while edge.now < 20.0:
        compute_step(edge, SMALL)
    newcomer, began = decoding(edge, "newcomer", prompt=100), edge.now
    while not newcomer.committed:
        compute_step(edge, SMALL)
    assert edge.now - began < 2.5, "four tenths of a second alone"


@pytest.mark.parametrize("machine", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("chats", [0, 1, 12])
@pytest.mark.parametrize(("long", "prompt"), [(0, 200), (0, 4000), (3, 4000)])
def test_the_time_of_a_first_token_is_estimated(machine: Machine, chats: int, long: int, prompt: int) -> None:
    edge = long_context_edge()
    for number in range(chats):
        decoding(edge, f"chat-{number}", prompt=40)
    for number in range(long):
        decoding(edge, f"long-{number}", prompt=4000)
    edge.scheduler._cost.add_prompts(machine.prompt_s, tokens=1)
    while edge.now < 3.0:
        compute_step(edge, machine)
    estimated = edge.scheduler.wait_of_new(edge.sessions, "new", (1,) * prompt, stable=False, now=edge.now)
    estimated_s = estimated.seconds
    new, began = decoding(edge, "new", prompt=prompt), edge.now
    while not new.committed:
        compute_step(edge, machine)
    assert 0.5 * estimated_s - 1.0 < edge.now - began < 2.0 * estimated_s + 1.0


def test_a_device_is_told_what_its_admission_was_decided_on() -> None:
    edge = long_context_edge(sharing=PrefixSharing.ALL)
    first = decoding(edge, "first", prompt=(2,) * 2000)
    edge.scheduler._cost.add_prompts(LARGE.prompt_s, tokens=1)
    while edge.now < 3.0:
        compute_step(edge, LARGE)
    edge.session(prompt=(3,) * 500, device="silent")  # nothing is asked of it yet
    decoding(edge, "alike", prompt=(*first.tokens[:1500], *(4,) * 700))  # a part of it is computed already
    prompt = (*first.tokens[:1000], *(5,) * 900)
    estimated = edge.scheduler.wait_of_new(edge.sessions, "new", prompt, stable=False, now=edge.now)
    new = decoding(edge, "new", prompt=prompt)
    (told,) = (wait for session, _, wait in edge.scheduler.progress(edge.sessions, now=edge.now) if session is new)
    assert told == estimated
    assert told.seconds > 0


DEVICES = 32
PROMPT = 24
ROOM_FOR = 10


def test_a_turn_lasts_until_as_much_is_verified_as_was_computed_to_come_in() -> None:
    turns = MemoryTurns()
    assert not turns.lasts(1, now=0.0)
    turns.count(1, prefilled=20, verified=0, at=0.0)
    turns.count(1, prefilled=0, verified=19, at=1.0)
    assert turns.lasts(1, now=1.0)
    turns.count(1, prefilled=0, verified=3, at=1.0)
    assert (turns.lasts(1, now=1.0), turns.balance(1)) == (False, -2)
    turns.end(1)
    turns.count(1, prefilled=5, verified=0, at=1.0)
    assert (turns.lasts(1, now=1.0), turns.balance(1)) == (True, 5)


def test_who_is_absent_for_long_keeps_no_place() -> None:
    turns = MemoryTurns()
    turns.count(1, prefilled=20, verified=0, at=5.0)
    assert turns.lasts(1, now=6.0)
    assert not turns.lasts(1, now=10.0)


def test_a_prompt_that_waits_for_its_share_keeps_its_place_where_steps_are_long() -> None:
    turns = MemoryTurns()
    turns.on_step(step_report({2: 1}, step_s=0.35, at=1.0))  # 7B on two cores, 16 devices
    turns.count(1, prefilled=20, verified=0, at=1.0)
    assert turns.lasts(1, now=10.0)
    assert not turns.lasts(1, now=14.0)


@pytest.mark.parametrize("pacing", [FixedPacing(32, edge_only=True), FixedPacing(3)], ids=["written", "drafted"])
def test_busy_sessions_that_do_not_all_fit_take_turns(pacing: Pacing, monkeypatch: pytest.MonkeyPatch) -> None:
    # Holding a step needs a running clock; and where further tokens cost no time, the edge speculates many.
    settings = {"prefix_sharing": "off", "step_tokens": 256, "gather_share": 0.0}
    fleet = MemoryFleet(kv_tokens=ROOM_FOR * 2 * PROMPT, settings=settings)
    computed = 0
    score = fleet.verifier.score

    def counted(items: Sequence[Item]) -> Logits:
        nonlocal computed
        computed += sum(len(item.tokens) for item in items)
        fleet.clock.seconds += 0.05
        return score(items)

    monkeypatch.setattr(fleet.verifier, "score", counted)
    devices = []
    for number in range(DEVICES):
        prompt = (1, *(1 + (number >> place) % 2 for place in range(PROMPT - 1)))
        asked = terms(100 + number, mode=Mode.COUPLED, max_new_tokens=40, prompt=prompt)
        devices.append(Device(fleet, f"device-{number}", asked, length=3, ahead=False, pacing=pacing))
    while not all(device.done for device in devices):
        fleet.broker.pump()
        moved = [device.act() for device in devices]  # all are busy
        fleet.broker.pump()
        assert fleet.step() or any(moved)
    assert [device.session.committed for device in devices] == [lossless_text(device.terms) for device in devices]
    written = sum(len(device.session.committed) for device in devices)
    # At least each prompt, each token and each rejected draft once; without fairness it is ten times that.
    assert computed < 3 * (DEVICES * PROMPT + written)
