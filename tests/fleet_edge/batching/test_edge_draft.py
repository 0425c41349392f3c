import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from fleet_device.pacing.contract import FixedPacing
from fleet_edge.batching.edge_draft import LENGTHS, DraftLengths, TargetDrafter
from fleet_edge.verifiers.contract import Item, VerifierError
from schemas.policy import Mode
from tests.fleet_edge.test_edge_only import asked_of, own_text
from tests.support.markov import MarkovScript
from tests.support.memory_broker import Faults
from tests.support.memory_fleet import DRAFT, TARGET, Device, MemoryFleet, Mishaps, possible, run
from tests.support.scripted_verifier import ScriptedVerifier


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Propose all lengths in turn: the clock of these fleets stands still, so no length is the fastest."""
    turn = iter(LENGTHS[number % len(LENGTHS)] for number in range(1 << 20))
    monkeypatch.setattr(DraftLengths, "choose", lambda *_args, **_others: next(turn))


class DraftingVerifier(ScriptedVerifier):
    """`DraftsItself` with the rows of another script."""

    def propose(self, tokens: Mapping[int, Sequence[int]]) -> NDArray[np.float32]:
        assert all(its and self.computed(sequence) for sequence, its in tokens.items())
        rows = [DRAFT.logits([*self._tokens[sequence], *its]) for sequence, its in tokens.items()]
        return np.stack(rows).astype(np.float32)


def decoded(
    draft: MarkovScript | None, modes: Sequence[Mode], temperature: float, *, seed: int = 1, kv_tokens: int = 1 << 20
) -> tuple[list[list[int]], int]:
    """Return the outputs of devices in edge-only decoding, and the number of steps of the target."""
    fleet = MemoryFleet(draft=draft, kv_tokens=kv_tokens)
    steps, score = 0, fleet.verifier.score

    def counting(items: Sequence[Item]):  # type: ignore[no-untyped-def]
        nonlocal steps
        steps += 1
        return score(items)

    fleet.verifier.score = counting  # type: ignore[method-assign]
    devices = [
        Device(
            fleet, f"device-{number}", asked_of(seed + number, mode, temperature), length=0, ahead=False,
            pacing=FixedPacing(16, edge_only=True),
        )
        for number, mode in enumerate(modes)
    ]  # fmt: skip
    run(fleet, devices, random.Random(1))
    return [list(device.session.committed) for device in devices], steps


MODES = [Mode.COUPLED, Mode.RESIDUAL, Mode.COUPLED, Mode.RESIDUAL]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("draft", [DRAFT, TARGET, MarkovScript(size=6, seed=99)], ids=["near", "same", "foreign"])
def test_outputs_do_not_depend_on_the_draft_model(draft: MarkovScript, temperature: float) -> None:
    outputs, _ = decoded(draft, MODES, temperature)
    assert outputs == [own_text(asked_of(1 + number, mode, temperature)) for number, mode in enumerate(MODES)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kv_tokens", [1 << 20, 150], ids=["", "little memory"])
def test_a_target_that_drafts_itself_saves_steps_and_changes_no_output(
    kv_tokens: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, steps = decoded(None, MODES, temperature, kv_tokens=kv_tokens)
    monkeypatch.setattr("tests.support.memory_fleet.ScriptedVerifier", DraftingVerifier)
    outputs, fewer = decoded(None, MODES, temperature, kv_tokens=kv_tokens)
    assert outputs == plain == [own_text(asked_of(1 + number, mode, temperature)) for number, mode in enumerate(MODES)]
    assert steps > 1.2 * fewer


def test_a_draft_model_saves_steps_and_a_better_one_more() -> None:
    steps = [decoded(draft, MODES, 0.8)[1] for draft in (None, DRAFT, TARGET)]
    assert steps[0] > 1.2 * steps[1] > 1.2 * steps[2]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_lost_or_restarted_the_output_is_the_same(seed: int) -> None:
    rng = random.Random(seed)
    faults = Faults(drop=0.1, duplicate=0.1, reorder=0.2)
    fleet = MemoryFleet(rng=rng, faults=faults, draft=DRAFT)
    asked = asked_of(seed, Mode.COUPLED, 0.4)
    device = Device(
        fleet, "device-1", asked, length=0, ahead=False, pacing=FixedPacing(rng.randint(1, 32), edge_only=True)
    )
    run(fleet, [device], rng, mishaps=Mishaps(restart=0.01, resume=0.01))
    assert list(device.session.committed) == own_text(asked)
    assert possible(asked, device.session.committed)


def test_memory_of_the_draft_model_is_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.memory_fleet.DRAFT_TOKENS", 90)  # two of the four sequences
    outputs, steps = decoded(DRAFT, MODES, 0.8)
    assert outputs == [own_text(asked_of(1 + number, mode, 0.8)) for number, mode in enumerate(MODES)]
    assert steps < decoded(None, MODES, 0.8)[1]


def test_a_draft_model_that_fails_costs_nothing_but_its_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise VerifierError("It has failed.")

    expected = [own_text(asked_of(1 + number, mode, 0.8)) for number, mode in enumerate(MODES)]
    monkeypatch.setattr("fleet_edge.batching.edge_draft.EdgeDrafter._score", fail)
    assert decoded(DRAFT, MODES, 0.8)[0] == expected


def test_a_draft_model_whose_tokens_are_not_proposed_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet_edge.batching.edge_draft._CHUNK", 16)  # these requests are short
    monkeypatch.setattr(DraftLengths, "choose", lambda *_args, **_others: 0)
    computed = list[object]()
    monkeypatch.setattr("fleet_edge.batching.edge_draft.EdgeDrafter._score", lambda _, items: computed.append(items))
    decoded(DRAFT, MODES, 0.8)
    assert not computed


def test_what_was_proposed_is_counted_once_also_where_steps_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = list[Sequence[float]]()
    monkeypatch.setattr(DraftLengths, "choose", lambda _self, found, **_others: rates.append(found) or 0)
    session = SimpleNamespace(handle=1, tokens=[5], constraint=None)
    work = SimpleNamespace(session=session, decodes=True, speculated=(), item=Item(1, [5], 1))
    batch = SimpleNamespace(works=[work], prefilled=[])
    report = SimpleNamespace(batch=batch, proposed={1: (6, 8)}, orders=[], times=SimpleNamespace(seconds=1.0))
    drafter = TargetDrafter(SimpleNamespace())  # type: ignore[arg-type]
    drafter.order(batch)  # type: ignore[arg-type]
    drafter.on_step(report)  # type: ignore[arg-type]
    session.tokens += [6, 7]
    drafter.order(batch)  # type: ignore[arg-type]
    session.tokens += [6, 8]  # the drafter had no report of that step
    drafter.order(batch)  # type: ignore[arg-type]
    before, first, again = rates
    assert before != first == again


class TestLengths:
    """The number of proposed tokens, by step times in seconds."""

    @pytest.fixture(autouse=True)
    def always(self) -> None:
        """Choose for real."""

    @staticmethod
    def chosen(step_s: float, token_s: float, *, rate: float = 0.8, sessions: int = 1) -> int:
        """Return the most frequent choice after some steps, each of which takes time for every proposed token."""
        lengths, choices = DraftLengths(), list[int]()
        for _ in range(400):
            length = lengths.choose([rate] * sessions)
            lengths.add_step(sessions, length, step_s + length * token_s)
            choices.append(length)
        late = choices[200:]
        return max(set(late), key=late.count)

    def test_cheap_drafts_are_long_and_dear_ones_short(self) -> None:
        assert self.chosen(1.0, 0.01) == LENGTHS[-1]
        assert 2 <= self.chosen(1.0, 0.4) <= 3
        assert self.chosen(1.0, 0.9) == 0

    def test_unlikely_drafts_are_not_made(self) -> None:
        assert self.chosen(1.0, 0.2, rate=0.1) == 0

    @pytest.mark.parametrize("measured", [True, False], ids=["measured", "never caught up"])
    def test_where_drafts_do_not_pay_they_are_tried_less_and_less(self, *, measured: bool) -> None:
        lengths, tried = DraftLengths(), list[bool]()
        for _ in range(8000):
            length = lengths.choose([0.8])
            if measured or not length:
                lengths.add_step(1, length, 1.0 + 0.9 * length)
            tried.append(length > 0)
        assert 0 < sum(tried[4000:]) <= 40

    def test_sessions_far_behind_do_not_catch_up_for_an_exploration(self) -> None:
        lengths = DraftLengths()
        for _ in range(1000):
            assert lengths.choose([0.8] * 64, behind=6400) == 0
            lengths.add_step(64, 0, 1.0)

    def test_a_session_with_a_long_prompt_catches_up(self) -> None:
        lengths, behind, choices = DraftLengths(), 5000, list[int]()
        for _ in range(400):
            length = lengths.choose([0.8], behind=behind)
            if length and behind > 256:
                behind -= 256
            else:
                lengths.add_step(1, length, 1.0 + 0.01 * length)
            choices.append(length)
        assert min(choices[-20:]) >= LENGTHS[-2]

    def test_drafts_are_made_once_they_pay(self) -> None:
        lengths, choices = DraftLengths(), list[int]()
        for step in range(12_000):
            length = lengths.choose([0.8])
            lengths.add_step(1, length, 1.0 + (0.9 if step < 4000 else 0.01) * length)
            choices.append(length)
        assert choices[3000] == 0
        assert min(choices[-20:]) >= LENGTHS[-2]

    def test_a_load_is_measured_by_itself(self) -> None:
        lengths = DraftLengths()
        for _ in range(400):
            length = lengths.choose([0.8])
            lengths.add_step(1, length, 1.0 + 0.05 * length)
            length = lengths.choose([0.8] * 16)
            lengths.add_step(16, length, 1.0 + 0.9 * length)
        late = [(lengths.choose([0.8]), lengths.choose([0.8] * 16)) for _ in range(_ROUND)]
        assert sum(one for one, _ in late) > 4 * _ROUND
        assert sum(many for _, many in late) < _ROUND / 2


_ROUND = 32
