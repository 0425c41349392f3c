"""Batched verification: shape all rows of a step where the logits are, and decide on every draft.

Policies with a bounded support (greedy, or top_k) are shaped at once, in numpy or torch. Others, those that adjust
logits, and generations with a grammar are shaped row by row with the reference implementation, only as far as drafts
are accepted.
`sampling.verification.judge` decides; a property test compares the two ways of shaping.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fleet_edge.batching.shaping import RowGroup, ShapedRows, shape_rows
from fleet_edge.sessions.grammars import Constraint
from fleet_edge.verifiers.contract import Logits
from sampling.distribution import Dist, shape
from sampling.verification import Judgement, decode, judge, logprobs_of_rejection, logprobs_of_token
from schemas.policy import SamplingPolicy

if TYPE_CHECKING:
    import torch  # an edge may do without it


@dataclass(frozen=True, slots=True)
class Case:
    """One session's drafts to decide on: the parameters of `sampling.verification.judge`, or of `decode`.

    `tokens` is the draft after position `base`, or speculated tokens in edge-only decoding (`written`). `counts` are
    draft probabilities in 1/65,536; None in coupled mode. `logprobs` top log-probabilities are reported at each
    position. `text`, the tokens before the draft, is only needed with a grammar, and with a policy that adjusts logits,
    as are `prompt` and `end_tokens`. Of `scored` tokens, those of a prompt, only the log-probabilities are wanted.
    """

    tokens: tuple[int, ...]
    counts: tuple[int, ...] | None
    policy: SamplingPolicy
    base: int
    bonus: bool
    written: bool = False
    logprobs: int | None = None
    constraint: Constraint | None = None
    text: tuple[int, ...] = ()
    prompt: Sequence[int] = ()
    end_tokens: Collection[int] = ()
    scored: bool = False

    @property
    def rows(self) -> int:
        return len(self.tokens) + (self.bonus or self.written or not self.tokens)

    def policy_at(self, number: int) -> SamplingPolicy:
        """Return the policy for a row, behind the first `number` tokens of the draft."""
        return self.policy.after(self.prompt, (*self.text, *self.tokens[:number]), self.end_tokens)


def judge_batch(logits: Logits, cases: Sequence[Case]) -> list[Judgement | None]:
    """Decide on all cases; `logits` are float32 `[sum of case.rows, vocabulary]`, cases in order.

    Returns None for a case whose logits are not numbers or whose grammar failed (see `Constraint.failure`). Judgements
    hold no references to the logits.
    """
    if not isinstance(logits, np.ndarray):
        if logits.device.type != "cpu":
            return judge_tensor(logits, cases)
        logits = logits.numpy()  # the same memory
    starts, groups = _grouped(cases, logits.shape[1])
    shaped = [shape_rows(logits, group.policies, group.support, group.rows) for group in groups]
    return _decide_all(cases, starts, groups, shaped, row_at=logits.__getitem__)


def judge_tensor(logits: "torch.Tensor", cases: Sequence[Case]) -> list[Judgement | None]:
    """Decide on all cases where the logits are on another device; synchronizes with it once."""
    from fleet_edge.batching.torch_shaping import shape_groups  # noqa: PLC0415 - an edge may do without torch

    starts, groups = _grouped(cases, logits.shape[1])
    among = {place for group in groups for place in group.places}
    whole = [
        row
        for place, case in enumerate(cases)
        if place not in among or case.logprobs is not None
        for row in range(starts[place], starts[place] + case.rows)
    ]
    shaped, rows = shape_groups(logits, groups, whole)
    number = {row: index for index, row in enumerate(whole)}
    return _decide_all(cases, starts, groups, shaped, row_at=lambda row: rows[number[row]])


def _grouped(cases: Sequence[Case], size: int) -> tuple[list[int], list[RowGroup]]:
    starts = [0, *itertools.accumulate(case.rows for case in cases)]
    by_support: dict[int, list[int]] = defaultdict(list)
    for place, case in enumerate(cases):
        support = 1 if case.policy.greedy else case.policy.top_k
        if 0 < support < size and case.constraint is None and not case.scored and not case.policy.adjusts:
            by_support[support].append(place)
    groups = [
        RowGroup(
            support,
            places,
            np.concatenate([np.arange(starts[place], starts[place + 1]) for place in places]),
            [cases[place].policy for place in places for _ in range(cases[place].rows)],
        )
        for support, places in by_support.items()
    ]
    return starts, groups


def _decide_all(
    cases: Sequence[Case],
    starts: Sequence[int],
    groups: Sequence[RowGroup],
    shaped: Sequence[ShapedRows],
    *,
    row_at: Callable[[int], NDArray[np.float32]],
) -> list[Judgement | None]:
    dist_at = [_unbounded(row_at, start, case) for start, case in zip(starts, cases, strict=False)]
    for group, rows in zip(groups, shaped, strict=True):
        offset = 0
        for place in group.places:
            dist_at[place] = _bounded(rows, offset)
            offset += cases[place].rows
    decided = [_decide(case, at) for case, at in zip(cases, dist_at, strict=True)]
    return [
        each if each is None or case.logprobs is None else _with_logprobs(each, case, row_at, start)
        for each, case, start in zip(decided, cases, starts, strict=False)
    ]


def _with_logprobs(
    judgement: Judgement, case: Case, row_at: Callable[[int], NDArray[np.float32]], start: int
) -> Judgement | None:
    """Return a judgement with the log-probabilities of its tokens; None if the logits are not numbers.

    `row_at` returns an unshaped row of logits; `start` is the first row of the case.
    """
    most = case.logprobs or 0
    tokens = case.tokens[: judgement.accepted]
    if judgement.token is not None:
        tokens = (*tokens, judgement.token)
    try:
        found = [logprobs_of_token(row_at(start + place), token, most=most) for place, token in enumerate(tokens)]
    except ValueError:
        return None
    if judgement.p is not None:
        row = row_at(start + judgement.accepted)
        found.append(logprobs_of_rejection(row, judgement.p, policy=case.policy, most=most))
    return replace(judgement, logprobs=tuple(found))


def _bounded(shaped: ShapedRows, offset: int) -> Callable[[int], Dist]:
    return lambda number: shaped.row(offset + number)


def _unbounded(row_at: Callable[[int], NDArray[np.float32]], offset: int, case: Case) -> Callable[[int], Dist]:
    constraint = case.constraint
    if constraint is None:
        return lambda number: shape(row_at(offset + number), case.policy_at(number))
    text, tokens = case.text, case.tokens

    def constrained(number: int) -> Dist:
        return constraint.shape(row_at(offset + number), case.policy_at(number), text=(*text, *tokens[:number]))

    return constrained


def _decide(case: Case, at: Callable[[int], Dist]) -> Judgement | None:
    if case.scored:
        return Judgement(len(case.tokens), rejected=False)
    try:
        if case.written:
            judgement = decode(at, case.tokens, policy=case.policy, base=case.base)
        else:
            judgement = judge(at, case.tokens, case.counts, policy=case.policy, base=case.base, bonus=case.bonus)
    except ValueError:
        return None
    if (constraint := case.constraint) is None:
        return judgement
    if case.written:
        written = case.tokens[: judgement.accepted] + (() if judgement.token is None else (judgement.token,))
        constraint.look_ahead((*case.text, *written))
    return constraint.count(judgement)
