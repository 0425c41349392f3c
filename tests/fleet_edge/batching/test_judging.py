import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from fleet_edge.batching.judging import Case, judge_batch, judge_tensor
from sampling.distribution import Dist, shape
from sampling.drawing import propose
from sampling.verification import Judgement, judge
from schemas.policy import Mode, SamplingPolicy
from tests.support.no_waiting import waits_counted

Rows = NDArray[np.float32]
JudgeBatch = Callable[[Rows, Sequence[Case]], list[Judgement | None]]
VOCABULARY = 30
POLICY = st.builds(
    SamplingPolicy,
    mode=st.sampled_from(Mode),
    temperature=st.sampled_from((0.0, 0.3, 0.7, 1.0, 2.0)),
    top_k=st.sampled_from((0, 1, 2, 7, 29, 30, 50)),
    top_p=st.sampled_from((0.3, 0.8, 0.95, 1.0)),
    seed=st.integers(0, 2**64 - 1),
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Rows, list[Case]]:
    """Draw logits and drafts of several sessions; drafts come from noisy logits, so that some tokens are accepted."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, cases = [], []
    for _ in range(draw(st.integers(1, 5))):
        policy = draw(POLICY)
        length, base = draw(st.integers(0, 6)), draw(st.integers(0, 1000))
        logits = random.normal(size=(length + 1, VOCABULARY)).astype(np.float32) * 2
        if draw(st.booleans()):
            logits = np.round(logits)  # ties
        if draw(st.booleans()):
            logits[random.random(logits.shape) < 0.3] = -np.inf
            logits[:, 0] = 1.0
        noise = random.normal(size=logits.shape) * draw(st.sampled_from((0.0, 0.5, 3.0)))
        proposals = [
            propose(shape(logits[place] + noise[place], policy), policy=policy, position=base + place)
            for place in range(length)
        ]
        counts = tuple(proposal.count or 0 for proposal in proposals) if policy.mode is Mode.RESIDUAL else None
        tokens = tuple(proposal.token for proposal in proposals)
        cases.append(Case(tokens, counts, policy, base, bonus=draw(st.booleans())))
        rows.append(logits[: cases[-1].rows])
    return np.concatenate(rows), cases


def of_array(logits: Rows, cases: Sequence[Case]) -> list[Judgement | None]:
    logits.flags.writeable = False
    try:
        return judge_batch(logits, cases)
    finally:
        logits.flags.writeable = True


def of_tensor(logits: Rows, cases: Sequence[Case]) -> list[Judgement | None]:
    return judge_batch(torch.from_numpy(logits), cases)


def of_device(logits: Rows, cases: Sequence[Case]) -> list[Judgement | None]:
    """Judge as if the tensor were on another device, and check that nothing waits for it."""
    with waits_counted() as waits:
        found = judge_tensor(torch.from_numpy(logits), cases)
    assert waits == []
    return found


every = pytest.mark.parametrize("judge_all", [of_array, of_tensor, of_device])


def by_the_law(logits: Rows, cases: Sequence[Case]) -> list[Judgement | None]:
    starts = np.cumsum([0, *(case.rows for case in cases)])
    return [decide(logits[start:], case) for start, case in zip(starts[:-1], cases, strict=True)]


def decide(rows: Rows, case: Case) -> Judgement | None:
    def row(place: int) -> Dist:
        return shape(rows[place], case.policy)

    try:
        return judge(row, case.tokens, case.counts, policy=case.policy, base=case.base, bonus=case.bonus)
    except ValueError:
        return None


def same(twin: Judgement | None, law: Judgement | None) -> None:
    assert (twin is None) == (law is None)
    if twin is None or law is None:
        return
    assert (twin.accepted, twin.rejected, twin.token) == (law.accepted, law.rejected, law.token)
    assert (twin.p is None) == (law.p is None)
    if twin.p is not None and law.p is not None:
        assert twin.p.ids.tolist() == law.p.ids.tolist()
        assert twin.p.probs == pytest.approx(law.p.probs, rel=1e-6)
        assert (twin.p.probs.astype(np.float32) == twin.p.probs).all()


@every
@given(batch=batches())
@settings(max_examples=80, deadline=None)
def test_the_batched_twin_decides_as_the_law_does(judge_all: JudgeBatch, batch: tuple[Rows, list[Case]]) -> None:
    logits, cases = batch
    twins = judge_all(logits, cases)
    for twin, law in zip(twins, by_the_law(logits, cases), strict=True):
        same(twin, law)


@every
@pytest.mark.parametrize(
    "policy",
    [SamplingPolicy(temperature=0, seed=1), SamplingPolicy(top_k=5, seed=1), SamplingPolicy(top_k=0, seed=1)],
    ids=repr,
)
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_nan_spoil_only_their_case(judge_all: JudgeBatch, policy: SamplingPolicy, wrong: float) -> None:
    random = np.random.default_rng(1)
    logits = random.normal(size=(3, VOCABULARY)).astype(np.float32)
    logits[1, 4] = wrong
    cases = [Case((), (), policy, 0, bonus=True)] * 3
    before, spoilt, after = judge_all(logits, cases)
    assert spoilt is None
    law = by_the_law(logits, cases)
    same(before, law[0])
    same(after, law[2])


def test_rows_behind_a_rejection_may_be_anything() -> None:
    """A device may draft anything; the rows after a rejection are not read."""
    logits = np.zeros((3, VOCABULARY), dtype=np.float32)
    logits[0, 7] = 50.0
    logits[1:] = math.nan
    policy = SamplingPolicy(top_k=3, seed=1)
    (judgement,) = judge_batch(logits, [Case((1, 2), (65536, 65536), policy, 0, bonus=True)])
    assert (judgement.accepted, judgement.rejected) == (0, True)


@every
def test_judgements_outlive_the_memory_that_the_logits_lay_in(judge_all: JudgeBatch) -> None:
    """A verifier may reuse the memory for its next step."""
    logits = np.random.default_rng(2).normal(size=(6, VOCABULARY)).astype(np.float32)
    policies = [SamplingPolicy(top_k=5, seed=1), SamplingPolicy(top_k=0, seed=1)]
    cases = [Case((7, 9), (65536, 65536), policy, 0, bonus=True) for policy in policies]
    law, memory = by_the_law(logits, cases), logits.copy()
    twins = judge_all(memory, cases)
    memory[:] = 3.0
    for twin, expected in zip(twins, law, strict=True):
        assert twin.rejected
        same(twin, expected)


def test_after_edge_only_decoding_a_grammar_looks_ahead_of_the_whole_output() -> None:
    seen: list[tuple[int, ...]] = []
    constraint: Any = SimpleNamespace(
        shape=lambda row, policy, *, text: shape(row, policy),  # noqa: ARG005, PLW0108 - `shape` takes no text
        look_ahead=seen.append,
        count=lambda judgement: judgement,
    )
    logits = np.zeros((2, VOCABULARY), dtype=np.float32)
    logits[0, 7] = logits[1, 4] = 50.0
    policy = SamplingPolicy(temperature=0, seed=1)
    judge_batch(logits, [Case((7,), None, policy, 2, bonus=True, written=True, text=(1, 2), constraint=constraint)])
    assert seen == [(1, 2, 7, 4)]
