"""Batched verification: shapes all rows of a step together, where the logits lie, and decides on every draft.

For policies with a bounded support (greedy, or top_k) all rows are shaped at once, in numpy or, where they lie on
another device, in torch. Other policies need a row's whole vocabulary, so they are shaped row by row by the reference
law, and only as far as drafts are accepted. The decision itself is `dssd.judgement.judge`, so twin and law can differ
in shaping alone; a property test holds the two together.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dssd.distribution import Dist, shape
from dssd.judgement import Judgement, judge
from fleet_edge.batching.shaping import ShapedRows, shape_rows
from fleet_edge.verifiers.contract import Logits
from schemas.policy import SamplingPolicy

__all__ = ["Case", "judge_batch"]


@dataclass(frozen=True, slots=True)
class Case:
    """One session's drafts to decide on; the parameters of `dssd.judgement.judge`.

    Attributes:
        tokens: The draft.
        counts: Its draft probabilities in 1/65,536; None in coupled mode.
        policy: The session's.
        base: Position of the first draft token.
        bonus: Whether a token is due after an accepted draft.
    """

    tokens: tuple[int, ...]
    counts: tuple[int, ...] | None
    policy: SamplingPolicy
    base: int
    bonus: bool

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
        A judgement for each; None where the target's logits are not numbers. Nothing in them refers to the logits.
    """
    if not isinstance(logits, np.ndarray) and logits.device.type == "cpu":
        logits = logits.numpy()  # the same memory
    starts = np.cumsum([0, *(case.rows for case in cases)])
    dist_at: list[Callable[[int], Dist]] = [
        _unbounded(logits, int(start), case.policy) for start, case in zip(starts[:-1], cases, strict=True)
    ]
    groups: dict[int, list[int]] = defaultdict(list)
    for place, case in enumerate(cases):
        support = 1 if case.policy.greedy else case.policy.top_k
        if 0 < support < logits.shape[-1]:
            groups[support].append(place)
    for support, places in groups.items():
        rows = np.concatenate([np.arange(starts[place], starts[place + 1]) for place in places])
        policies = [cases[place].policy for place in places for _ in range(cases[place].rows)]
        shaped = _shape(logits, rows, policies, support)
        offset = 0
        for place in places:
            dist_at[place] = _bounded(shaped, offset)
            offset += cases[place].rows
    return [_decide(case, at) for case, at in zip(cases, dist_at, strict=True)]


def _shape(logits: Logits, rows: NDArray[np.int64], policies: Sequence[SamplingPolicy], support: int) -> ShapedRows:
    """Shape some of the rows, for policies of one bounded support."""
    every = len(rows) == len(logits)
    if isinstance(logits, np.ndarray):
        return shape_rows(logits if every else logits[rows], policies, support)
    from fleet_edge.batching import torch_shaping  # noqa: PLC0415 - an edge may do without torch

    return torch_shaping.shape_rows(logits if every else logits[rows.tolist()], policies, support)


def _bounded(shaped: ShapedRows, offset: int) -> Callable[[int], Dist]:
    return lambda number: shaped.row(offset + number)


def _unbounded(logits: Logits, offset: int, policy: SamplingPolicy) -> Callable[[int], Dist]:
    def at(number: int) -> Dist:
        row = logits[offset + number]
        return shape(row if isinstance(row, np.ndarray) else row.cpu().numpy(), policy)

    return at


def _decide(case: Case, at: Callable[[int], Dist]) -> Judgement | None:
    try:
        return judge(at, case.tokens, case.counts, policy=case.policy, base=case.base, bonus=case.bonus)
    except ValueError:
        return None
