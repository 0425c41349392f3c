"""Draft model at the edge: proposed tokens for edge-only decoding.

The requests of a step draft together with a small model, one token of each per pass over that model. A proposed token
is computed in the same step of the target as the token before it, and kept only if it is the token that the edge draws
at that position anyway (`sampling.verification.decode`), so the output does not depend on the draft model. It draws
with the same random numbers, so that the two often agree.

The number of proposed tokens is chosen for each step: the one with the most tokens per second, by measured times of
steps with as many sessions and by each session's acceptance rate. Under load that is none.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from fleet_edge.batching.judging import Case, judge_batch
from fleet_edge.batching.steps import Batch, DraftOrder, StepReport, WorkItem
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.verifiers.contract import Item, Logits, Verifier, VerifierError
from fleet_edge.verifiers.prefix_cache import PrefixCache

_log = logging.getLogger(__name__)

LENGTHS: Final = (0, 1, 2, 3, 4, 6, 8)
"""Numbers of proposed tokens that are chosen from."""

_FIRST: Final = 3
"""Number that is tried first, to learn what a proposed token costs."""

_SMOOTHING: Final = 0.2
"""Weight of the latest step in the mean time of its kind."""

_PAUSE: Final = 29
_LONGEST_PAUSE: Final = 2048
"""Steps between two explorations; longer and longer while drafts do not pay."""

_EXPLORED: Final = 3
_EXPLORED_BEHIND: Final = 5
"""Steps of an exploration, which measures a neighbour of the best number again, once sessions have caught up."""

_FEW: Final = 4
"""Sessions that catch up however far behind they are; more of them do so only if they are near."""

_VERIFIED: Final = 2.0
"""Tokens that a step is assumed to commit of a session whose device drafts."""

_PRIOR: Final = 0.6
_PRIOR_TOKENS: Final = 4.0
_REMEMBERED: Final = 64
"""Number of proposed tokens, about, over which an acceptance rate is averaged."""

_CHUNK: Final = 256
"""Most tokens of prompts that the draft model computes in a step."""


@dataclass(slots=True)
class _Load:
    """Measurements of steps with a similar number of sessions."""

    seconds: dict[int, float] = field(default_factory=dict)  # by number of proposed tokens
    pause: int = _PAUSE
    """Steps between two explorations."""
    left: int = 0
    """Steps until the next exploration."""
    explored: int = 0
    """Steps of the present exploration."""
    side: int = 1

    def choose(self, speeds: Mapping[int, float], behind: int, *, few: bool) -> int:
        """Return the number with the most tokens per second, or one to be measured (again)."""
        if 0 not in self.seconds:
            return 0
        known = set(self.seconds) != {0}
        best = max(LENGTHS, key=lambda length: speeds[length]) if known else 0
        if self.left:
            self.left -= 1
            return best
        # Where drafts do not pay, sessions have to catch up first each time.
        far = not best and behind > 2 * _CHUNK
        self.explored += not (far and few)
        if (far and not few) or self.explored > (_EXPLORED if best else _EXPLORED_BEHIND):
            self.pause = _PAUSE if best else min(2 * self.pause, _LONGEST_PAUSE)
            self.left, self.explored, self.side = self.pause, 0, -self.side
            return best
        if not known:
            return LENGTHS[_FIRST]
        return LENGTHS[min(max(LENGTHS.index(best) + (self.side if best else 1), 0), len(LENGTHS) - 1)]

    def add_step(self, length: int, seconds: float) -> None:
        before = self.seconds.get(length, seconds)
        self.seconds[length] = before + _SMOOTHING * (seconds - before)

    def time(self, length: int) -> float:
        """Return the time of a step, on the line through the two nearest numbers that were measured."""
        if (found := self.seconds.get(length)) is not None:
            return found
        nearest = sorted((abs(each - length), each, seconds) for each, seconds in self.seconds.items())[:2]
        if not nearest[1:]:
            return math.inf
        (_, left, first_s), (_, right, second_s) = nearest
        slope = max(0.0, (second_s - first_s) / (right - left))
        return first_s + slope * (length - left)


@dataclass(slots=True)
class DraftLengths:
    """Choose the number of proposed tokens by the measured times of steps."""

    _loads: dict[int, _Load] = field(default_factory=dict)

    def choose(self, rates: Sequence[float], *, others: int = 0, behind: int = 0) -> int:
        """Return the number of tokens to propose for sessions with these acceptance rates, next to `others`.

        `behind` are the tokens that the draft model has not computed yet.
        """
        load = self._load(len(rates) + others)
        verified = _VERIFIED * others
        return load.choose(
            {
                length: (verified + sum(_expected(rate, length) for rate in rates)) / load.time(length)
                for length in LENGTHS
            },
            behind,
            few=len(rates) <= _FEW,
        )

    def add_step(self, sessions: int, length: int, seconds: float) -> None:
        """Record the time of a step, drafting included."""
        self._load(sessions).add_step(length, seconds)

    def _load(self, sessions: int) -> _Load:
        return self._loads.setdefault(sessions.bit_length(), _Load())


def _expected(rate: float, length: int) -> float:
    """Return the mean number of tokens of a step with proposed tokens, the one behind them included."""
    return sum(rate**place for place in range(length + 1))


@dataclass(slots=True)
class _Sequence:
    """Tokens that were last proposed for a session, from position `at` of prompt and generation on."""

    at: int = 0
    proposed: tuple[int, ...] = ()
    tested: float = _PRIOR_TOKENS
    right: float = _PRIOR * _PRIOR_TOKENS

    def learn(self, tokens: Sequence[int]) -> int:
        """Count which proposed tokens were right; return the number of tokens that the draft model has seen so."""
        for place, token in enumerate(self.proposed, start=self.at):
            if place >= len(tokens):
                return place
            kept = 1.0 - 1.0 / _REMEMBERED
            right = tokens[place] == token
            self.tested = kept * self.tested + 1.0
            self.right = kept * self.right + right
            if not right:
                return place
        return self.at + len(self.proposed)


class EdgeDrafter:
    """Propose tokens with a draft model for sessions in edge-only decoding.

    Thread safety: `draft` runs on the computing thread during a step, all other methods between two steps.
    """

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier
        self._lengths = DraftLengths()
        self._sequences: dict[int, _Sequence] = {}  # the least recently used first

    def order(self, batch: Batch) -> list[DraftOrder]:
        """Choose the sessions and the number of tokens to draft for in a step."""
        works = {work.session.handle: work for work in batch.works if self._draftable(work)}
        seen = {handle: self._follow(work.session) for handle, work in works.items()}
        if not works:
            return []
        rates = [its.right / its.tested for its in (self._sequences[handle] for handle in works)]
        behind = sum(len(work.session.tokens) - seen[handle] for handle, work in works.items())
        length = self._lengths.choose(rates, others=len(batch.works) - len(works), behind=behind)
        if not length:
            return []  # the draft model does not even follow: that would cost it a pass over each token
        orders, left = list[DraftOrder](), _CHUNK
        for handle, work in works.items():
            session, start = work.session, seen[handle]
            tokens = tuple(session.tokens[start : start + left])
            left -= len(tokens)
            whole = start + len(tokens) == len(session.tokens)
            room = min(_room(session), self._verifier.info.context - len(session.tokens) - 1)
            most = max(0, min(length, room)) if whole else 0
            # A session far behind follows in large pieces.
            if tokens and (most or len(session.tokens) - start > _CHUNK // 4):
                ends = frozenset(session.limits.end_tokens)
                orders.append(DraftOrder(handle, tokens, session.policy, session.committed, most, ends))
        return self._fitting(orders)

    def propose(self, orders: Sequence[DraftOrder]) -> dict[int, tuple[int, ...]]:
        """Return the proposed tokens by session; empty if the draft model cannot compute them."""
        found: dict[int, tuple[int, ...]] = {order.handle: () for order in orders}
        running, inputs = list(orders), {order.handle: order.tokens for order in orders}
        while running:
            wanted = [order for order in running if len(found[order.handle]) < order.most]
            items = [
                Item(order.handle, inputs[order.handle], int(order in wanted), stable=False)
                for order in sorted(running, key=lambda order: order not in wanted)
            ]
            try:
                logits = self._score(items)
            except VerifierError as error:
                _log.warning("The edge's draft model could not draft for %d requests: %s", len(items), error)
                return {}
            cases = [
                Case((), None, order.policy, order.base + len(found[order.handle]), bonus=True, written=True)
                for order in wanted
            ]
            running = []
            for order, judgement in zip(wanted, judge_batch(logits, cases) if cases else (), strict=True):
                if judgement is None or judgement.token is None or judgement.token in order.ends:
                    continue
                found[order.handle] += (judgement.token,)
                inputs[order.handle] = (judgement.token,)
                if len(found[order.handle]) < order.most:
                    running.append(order)
        return found

    def on_step(self, report: StepReport) -> None:
        works, proposed = report.batch.works, report.proposed
        for work in works:
            handle = work.session.handle
            if handle in self._sequences:
                its = self._sequences[handle]
                its.at, its.proposed = len(work.session.tokens), proposed.get(handle, ())
        caught_up = all(len(order.tokens) <= LENGTHS[-1] + 1 for order in report.orders)
        if caught_up and not report.batch.prefilled:
            length = max((len(tokens) for tokens in proposed.values()), default=0)
            if length in LENGTHS:
                self._lengths.add_step(len(works), length, report.times.seconds)

    def forget(self, handle: int) -> None:
        if self._sequences.pop(handle, None) is not None:
            self._verifier.close(handle)

    def _score(self, items: Sequence[Item]) -> Logits:
        return self._verifier.score(items)

    def _draftable(self, work: WorkItem) -> bool:
        """The step decodes one token of a session without a grammar, and nothing else is speculated."""
        return work.decodes and not work.speculated and work.session.constraint is None

    def _follow(self, session: EdgeSession) -> int:
        """Return how many tokens of a session the draft model has computed, and drop others."""
        handle = session.handle
        its = self._sequences.pop(handle, None)
        if its is None:
            its = _Sequence()
            self._verifier.open(handle)
        self._sequences[handle] = its  # the latest
        right = its.learn(session.tokens)
        its.at, its.proposed = right, ()
        computed = min(self._verifier.computed(handle), right, len(session.tokens) - 1)
        self._verifier.truncate(handle, computed)
        return computed

    def _fitting(self, orders: list[DraftOrder]) -> list[DraftOrder]:
        """Return the orders for which there is memory, once the least recently used sequences are closed."""

        def items() -> list[Item]:
            return [Item(order.handle, (*order.tokens, *[0] * order.most), 0) for order in orders]

        drafted = {order.handle for order in orders}
        idle = [handle for handle in self._sequences if handle not in drafted]
        while orders and not self._verifier.fits(items()):
            if idle:
                self.forget(idle.pop(0))
            else:
                self.forget(orders.pop().handle)
        return orders


class TargetDrafter(EdgeDrafter):
    """Propose tokens with a layer of the target model itself, which has no sequences of its own."""

    def __init__(self, target: PrefixCache) -> None:
        super().__init__(target)
        self._target = target
        self._proposed: dict[int, list[int]] = {}  # in this step, behind the last token that is certain

    def propose(self, orders: Sequence[DraftOrder]) -> dict[int, tuple[int, ...]]:
        self._proposed = {order.handle: [] for order in orders}
        return super().propose(orders)

    def forget(self, handle: int) -> None:
        self._sequences.pop(handle, None)

    def _score(self, items: Sequence[Item]) -> Logits:
        for item in items:
            self._proposed[item.sequence] += item.tokens
        return self._target.propose({item.sequence: self._proposed[item.sequence] for item in items})

    def _draftable(self, work: WorkItem) -> bool:
        """The layer follows the target, which MUST have computed all tokens but the last."""
        return super()._draftable(work) and len(work.item.tokens) == 1

    def _follow(self, session: EdgeSession) -> int:
        its = self._sequences.setdefault(session.handle, _Sequence())
        its.learn(session.tokens)
        its.at, its.proposed = len(session.tokens), ()
        return len(session.tokens) - 1

    def _fitting(self, orders: list[DraftOrder]) -> list[DraftOrder]:
        """Return all orders: the step has the same tokens, so that it is the one to fit."""
        return orders


def _room(session: EdgeSession) -> int:
    """Return how many tokens can be proposed: the device also wants the one behind them."""
    assert session.decode is not None
    return session.decode.until - session.committed - 1


def with_proposed(batch: Batch, proposed: Mapping[int, tuple[int, ...]]) -> Batch:
    """Return a step that also computes proposed tokens."""
    return replace(batch, works=[_with(work, proposed.get(work.session.handle, ())) for work in batch.works])


def _with(work: WorkItem, tokens: tuple[int, ...]) -> WorkItem:
    if not tokens:
        return work
    (arrived,) = work.chain
    item = replace(work.item, tokens=(*work.item.tokens, *tokens), rows=work.item.rows + len(tokens))
    draft = arrived.draft.model_copy(update={"tokens": tokens})
    return replace(work, item=item, chain=(replace(arrived, draft=draft),))
