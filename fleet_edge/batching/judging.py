"""Batched verification: shapes all rows of a step together, where the logits lie, and decides on every draft.

For policies with a bounded support (greedy, or top_k) all rows are shaped at once in torch. Other policies need a
row's whole vocabulary, so they are shaped row by row by the reference law, and only as far as drafts are accepted.
The decision itself is `dssd.judgement.judge`, so twin and law can differ in shaping alone; a property test holds the
two together.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dssd.distribution import Dist, shape
from dssd.judgement import Judgement, judge
from fleet_edge.batching.topk import top_k
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


def judge_batch(logits: torch.Tensor, cases: Sequence[Case]) -> list[Judgement | None]:
    """Decide on all cases.

    Args:
        logits: float32 `[sum of case.rows, vocabulary]`, cases in order.
        cases: What to decide.

    Returns:
        A judgement for each; None where the target's logits are not numbers.
    """
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
        part = logits if len(rows) == len(logits) else logits[torch.from_numpy(rows).to(logits.device)]
        shaped = _shape_rows(part, policies, support)
        offset = 0
        for place in places:
            dist_at[place] = _bounded(shaped, offset)
            offset += cases[place].rows
    return [_decide(case, at) for case, at in zip(cases, dist_at, strict=True)]


@dataclass(frozen=True, slots=True)
class _Shaped:
    """Shaped rows: float32-representable probabilities `[rows, support]`, 0 where cut; ids alike."""

    ids: NDArray[np.int64]
    probs: NDArray[np.float64]

    def row(self, number: int) -> Dist:
        probs = self.probs[number]
        kept = int(np.count_nonzero(probs > 0.0))  # falling, so the positive ones come first; NaN counts as none
        if kept == 0:
            raise ValueError("The model's logits are not numbers.")
        return Dist(self.ids[number, :kept], probs[:kept])


def _shape_rows(logits: torch.Tensor, policies: Sequence[SamplingPolicy], support: int) -> _Shaped:
    """Shape rows `[n, vocabulary]` as `dssd.distribution.shape` does, for policies of one bounded support."""
    values, ids = top_k(logits, support)
    if support == 1:
        # Greedy, or top_k 1: a point mass, unless the best logit is no number.
        probs = torch.isfinite(values).double()
        return _Shaped(ids.cpu().numpy(), probs.cpu().numpy())
    columns = torch.tensor([[p.temperature, p.top_p] for p in policies], dtype=torch.float64, device=logits.device)
    temperature, top_p = columns[:, :1], columns[:, 1:]
    scores = values.double()
    weights = torch.exp((scores - scores[:, :1]) / temperature)
    weights /= weights.sum(dim=1, keepdim=True)
    mass_before = torch.cumsum(weights, dim=1).roll(1, dims=1)
    mass_before[:, 0] = 0.0
    weights = torch.where((mass_before < top_p) | (top_p >= 1.0), weights, 0.0)
    weights /= weights.sum(dim=1, keepdim=True)
    return _Shaped(ids.cpu().numpy(), weights.float().double().cpu().numpy())


def _bounded(shaped: _Shaped, offset: int) -> Callable[[int], Dist]:
    return lambda number: shaped.row(offset + number)


def _unbounded(logits: torch.Tensor, offset: int, policy: SamplingPolicy) -> Callable[[int], Dist]:
    return lambda number: shape(logits[offset + number].cpu().numpy(), policy)


def _decide(case: Case, at: Callable[[int], Dist]) -> Judgement | None:
    try:
        return judge(at, case.tokens, case.counts, policy=case.policy, base=case.base, bonus=case.bonus)
    except ValueError:
        return None
