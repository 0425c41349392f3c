"""Batched verification: shapes all rows of a step together, where the logits lie, and decides on every draft.

For policies with a bounded support (greedy, or top_k) all rows are shaped at once, in numpy or, where they lie on
another device, in torch. Other policies need a row's whole vocabulary, so they are shaped row by row by the reference
law, and only as far as drafts are accepted; so are those of texts that have a grammar, which is followed along the
draft. The decision itself is `dssd.verification.judge`, so twin and law can differ
in shaping alone; a property test holds the two together.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dssd.distribution import Dist, shape
from dssd.verification import Judgement, decode, judge
from fleet_edge.batching.logprobs import tell_logprobs
from fleet_edge.batching.shaping import ShapedRows, shape_rows
from fleet_edge.sessions.constraint import Constraint
from fleet_edge.verifiers.contract import Logits
from schemas.policy import SamplingPolicy

if TYPE_CHECKING:
    import torch  # an edge may do without it


@dataclass(frozen=True, slots=True)
class Case:
    """One session's drafts to decide on; the parameters of `dssd.verification.judge`, or of `write`.

    Attributes:
        tokens: The draft, or the edge's own guesses.
        counts: Its draft probabilities in 1/65,536; None in coupled mode.
        policy: The session's.
        base: Position of the first draft token.
        bonus: Whether a token is due after an accepted draft.
        written: Whether the edge writes by itself: a guess stands if it is the token that would be written anyway.
        logprobs: Of so many of the likeliest tokens at each place the log-probabilities are told; None tells none.
        constraint: The text's grammar, if it has one.
        text: The text before the draft; where there is a grammar.
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

    @property
    def rows(self) -> int:
        """Rows of logits that belong to it."""
        return len(self.tokens) + 1


def judge_batch(logits: Logits, cases: Sequence[Case]) -> list[Judgement | None]:
    """Decide on all cases.

    Args:
        logits: float32 `[sum of case.rows, vocabulary]`, cases in order.
        cases: What to decide.

    Returns:
        A judgement for each; None where the target's logits are not numbers, or the grammar cannot go on, which its
        constraint then tells. Nothing in them refers to the logits.
    """
    if isinstance(logits, np.ndarray):
        return judge_array(logits, cases)
    if logits.device.type == "cpu":
        return judge_array(logits.numpy(), cases)  # the same memory
    return judge_tensor(logits, cases)


def judge_array(logits: NDArray[np.float32], cases: Sequence[Case]) -> list[Judgement | None]:
    """Decide on all cases; see `judge_batch`."""
    starts, groups = _grouped(cases, logits.shape[1])
    shaped = [
        shape_rows(logits if len(group.rows) == len(logits) else logits[group.rows], group.policies, group.support)
        for group in groups
    ]
    return _decide_all(cases, starts, groups, shaped, row_at=logits.__getitem__)


def judge_tensor(logits: "torch.Tensor", cases: Sequence[Case]) -> list[Judgement | None]:
    """Decide on all cases where the logits lie on another device, which is waited for once; see `judge_batch`."""
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


@dataclass(frozen=True, slots=True)
class _Group:
    """Cases whose policies have one bounded support.

    Attributes:
        support: Tokens that a policy keeps at most.
        places: Of the cases.
        rows: int64, of all cases in order.
        policies: One for each row.
    """

    support: int
    places: list[int]
    rows: NDArray[np.int64]
    policies: list[SamplingPolicy]


def _grouped(cases: Sequence[Case], size: int) -> tuple[list[int], list[_Group]]:
    """Return the first row of each case, and groups of those that are shaped at once."""
    starts = [0, *itertools.accumulate(case.rows for case in cases)]
    by_support: dict[int, list[int]] = defaultdict(list)
    for place, case in enumerate(cases):
        support = 1 if case.policy.greedy else case.policy.top_k
        if 0 < support < size and case.constraint is None:
            by_support[support].append(place)
    groups = [
        _Group(
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
    groups: Sequence[_Group],
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
        each if each is None or case.logprobs is None else tell_logprobs(each, case, row_at, start)
        for each, case, start in zip(decided, cases, starts, strict=False)
    ]


def _bounded(shaped: ShapedRows, offset: int) -> Callable[[int], Dist]:
    return lambda number: shaped.row(offset + number)


def _unbounded(row_at: Callable[[int], NDArray[np.float32]], offset: int, case: Case) -> Callable[[int], Dist]:
    constraint = case.constraint
    if constraint is None:
        return lambda number: shape(row_at(offset + number), case.policy)
    text, tokens = case.text, case.tokens

    def constrained(number: int) -> Dist:
        return constraint.shape(row_at(offset + number), case.policy, text=(*text, *tokens[:number]))

    return constrained


def _decide(case: Case, at: Callable[[int], Dist]) -> Judgement | None:
    try:
        if case.written:
            judged = decode(at, case.tokens, policy=case.policy, base=case.base)
        else:
            judged = judge(at, case.tokens, case.counts, policy=case.policy, base=case.base, bonus=case.bonus)
    except ValueError:
        return None
    if (constraint := case.constraint) is None:
        return judged
    if case.written:
        written = case.tokens[: judged.accepted] + (() if judged.token is None else (judged.token,))
        constraint.look_ahead((*case.text, *written))
    return constraint.count(judged)
