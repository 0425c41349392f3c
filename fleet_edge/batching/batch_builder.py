"""Batch builder: which sessions a step computes, and how many tokens of each.

Verification comes first, oldest draft first. The rest of the token budget goes to prefill, limited to a measured time,
because a draft that arrives meanwhile waits for it, and to a chunk while others are verified or expected. Prompts whose
drafts have arrived come first: in turns the oldest, with a lead for short ones, and the one with the least left, so
that a short prompt never waits for all long ones. Work that has to wait (see `fairness`) is computed in the background:
in a step of its own, while no draft is here or due. A step may exceed its budget by the last draft that it takes.

A session reuses what others have computed of its prompt. If another is about to compute it, that one goes first and the
session waits for the end of the step.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fleet_edge.batching.fairness import Extra, ExtraWork
from fleet_edge.batching.step_cost import StepCost
from fleet_edge.batching.steps import Batch, WorkItem
from fleet_edge.errors import DraftFault
from fleet_edge.sessions.drafts import ReceivedDraft
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.verifiers.contract import Item
from fleet_edge.verifiers.prefix_cache import LEAST_REUSED, PrefixCache

_MIN_CHUNK: Final = 16
"""Prompt tokens in a step that has any, even on a slow edge: fewer cost nearly as much."""

_SHORT_S: Final = 1.0
"""Duration of a prompt that is not spread over steps to spare those who are served meanwhile."""

_PROMPTS_S: Final = 0.25
_PROMPTS_STEPS: Final = 2.0

_MAX_SCORED: Final = 64
"""Rows of logits of prompts in a step: they take memory, and delay the drafts that arrive meanwhile."""


def max_prompts_s(step_s: float, prompt_s: float = 0.0) -> float:
    """Return how long prompts may make a step of `step_s` take in addition; `prompt_s` is what the longest takes."""
    return step_s if prompt_s > _SHORT_S else max(_PROMPTS_S, _PROMPTS_STEPS * step_s)


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of one step.

    Attributes:
        prefill_chunk: Most tokens of prefill, and of work that had to wait, while other sessions are verified.
        device_share: Largest share of the tokens for one device while others wait.
    """

    tokens: int = 512
    prefill_chunk: int = 128
    device_share: float = 0.5


@dataclass(slots=True)
class BatchBuilder:
    """Builds the batch of one step.

    Attributes:
        used: Step in which each session was last; the least recent are prefilled first.
        prompts_s: Longest time for prompts in the step.
        shortest_first: The order of the prompts is by what is left of them, not by arrival as well.
    """

    cache: PrefixCache
    budget: Budget
    extra: ExtraWork
    cost: StepCost
    used: Mapping[int, int]
    now: float
    prompts_s: float
    shortest_first: bool = False
    gap_s: float = math.inf
    batch: Batch = field(default_factory=Batch)
    _forced: int = 0  # forced tokens that are speculated
    _able: dict[int, EdgeSession] = field(default_factory=dict)
    _computing: set[int] = field(default_factory=set)
    _scored: int = 0

    def build(self, sessions: Iterable[EdgeSession], *, evicted: set[int]) -> Batch:
        """Return the batch; empty if there is nothing to do now.

        Sessions in `evicted` are recomputed only when a draft needs it: otherwise sessions that do not all fit would
        evict each other forever.
        """
        ready: list[tuple[bool, float, int, EdgeSession]] = []
        behind: list[EdgeSession] = []
        for session in sessions:
            if (arrived := session.ready) is not None:
                # Where memory is short, sessions with computed tokens come first: the others would fill the step and
                # evict them.
                last = bool(evicted) and not self.cache.computed(session.handle)
                ready.append((last, arrived.at, session.handle, session))
            elif not session.finished and session.handle not in evicted and self._backlog(session) > 0:
                behind.append(session)
        ready.sort(key=lambda entry: entry[:3])
        self._able = {session.handle: session for session in (*(entry[-1] for entry in ready), *behind)}
        due, may_wait = list[EdgeSession](), list[EdgeSession]()
        for *_, session in ready:
            (may_wait if self._may_wait(session) else due).append(session)
        # A draft that waits for its own prompt counts as a prompt: computed first, it would delay the drafts that are
        # ready.
        near = [session for session in due if self._backlog(session) < LEAST_REUSED]
        far = [session for session in due if self._backlog(session) >= LEAST_REUSED]
        far.sort(key=lambda session: self._urgency(session, evicted=bool(evicted)))
        at_once = [session for session in behind if not self.extra.waits(session.device, Extra.PROMPTS, self.now)]
        left = self.budget.tokens
        most = max(_MIN_CHUNK, self.cost.prompt_tokens(self.prompts_s, left))
        reserved = min(self.budget.prefill_chunk, most, left // 2) if far else 0
        left -= self._verifications(near, left - reserved)
        others = bool(self.batch.verifications) or self.gap_s < math.inf
        chunk = min(left, most, self.budget.prefill_chunk if others else left)
        if others and (prompts := (*far, *at_once)):
            chunk = min(chunk, self._beside(prompts))
        chunk -= self._verifications(far, chunk)
        chunk -= self._prefills(at_once, chunk)
        first = {session.handle for session in at_once}
        rest = [session for session in behind if session.handle not in first]
        chunk = self._background_tokens(chunk, {session.device for session in (*may_wait, *rest)})
        if chunk > 0:
            chunk -= self._verifications(may_wait, chunk, background=True)
            self._prefills(rest, chunk, background=True)
        return self.batch

    def _urgency(self, session: EdgeSession, *, evicted: bool) -> tuple[bool, float]:
        """Return the place of a prompt whose draft waits; after evictions those without room come last."""
        assert session.ready is not None
        backlog = self._backlog(session)
        room = self.cache.capacity() + self.cache.retained_tokens
        comes_in = evicted and backlog > room and not self.cache.computed(session.handle)
        return comes_in, backlog if self.shortest_first else self.cost.place(session.ready.at, backlog)

    def _beside(self, prompts: Collection[EdgeSession]) -> int:
        """Return how many tokens of prompts to compute while others are verified or expected.

        Short prompts are computed at once. Each device with a long one lengthens the step by a step without prompts: so
        one prompt at most doubles the time between two tokens of the others, however fast the edge is.
        """
        if not self.cost.plain_s:
            return self.budget.prefill_chunk
        backlogs = {session.handle: self._backlog(session) for session in prompts}
        most = self.cost.prompt_tokens(_SHORT_S, 1 << 20)
        short = sum(tokens for tokens in backlogs.values() if tokens <= most)
        devices = {session.device for session in prompts if backlogs[session.handle] > most}
        least = 1 if self.batch.verifications else _MIN_CHUNK
        return max(least, short + self.cost.prompt_tokens(len(devices) * self.cost.plain_s, self.budget.prefill_chunk))

    def _background_tokens(self, most: int, devices: Collection[str]) -> int:
        """Return how many tokens of background work of these devices delay nobody for long; 0 if too few for a step."""
        if not devices or self.batch.works:
            return 0
        gap_s = 0.0 if self.gap_s == math.inf else self.gap_s
        tokens = self.cost.prompt_tokens(max(gap_s, self.extra.quiet_s(devices, self.now)), most)
        return tokens if tokens >= min(most, _MIN_CHUNK) else 0

    def _may_wait(self, session: EdgeSession) -> bool:
        device, now = session.device, self.now
        if session.constraint is not None and self.extra.waits(device, Extra.GRAMMAR, now):
            return True
        if self.extra.wasteful(device) and self.extra.waits(device, Extra.DRAFTS, now):
            return True
        if not self._backlog(session) or not self.extra.waits(device, Extra.PROMPTS, now):
            return False
        self._reuse(session)  # reused tokens take no time
        return self._backlog(session) > 0

    def _verifications(self, due: Sequence[EdgeSession], most: int, *, background: bool = False) -> int:
        """Add drafts, the oldest first, no device more than its share; return the tokens to compute."""
        left, share = most, Counter[str]()
        max_per_device = max(1, int(most * self.budget.device_share)) if len(due) > 1 else most
        for session in due:
            allowance = min(left, max_per_device - share[session.device])
            if allowance <= 0 or session.handle in self._computing:
                continue
            taken = self._in_turn(session, allowance, background=background)
            if taken is None:
                taken = self._verification(session, allowance, background=background)
            left -= taken
            share[session.device] += taken
        return most - left

    def _verification(self, session: EdgeSession, allowance: int, *, background: bool) -> int:
        """Add a session's drafts, or the first part of its backlog; return the tokens to compute."""
        first = session.ready
        try:
            forced = self.extra.max_forced(session.device, self._forced, self.now)
            chain = session.chain(allowance, forced=forced)
        except DraftFault as fault:
            assert first is not None
            self.batch.faults.append((session, first.draft, fault))
            return 0
        drafted = [token for arrived in chain for token in arrived.draft.tokens]
        # The last committed token is always recomputed: its row decides on the first draft token.
        backlog = self._backlog(session)
        if chain and not session.unscored and backlog + 1 + len(drafted) <= max(allowance, 1 + len(drafted)):
            computed = self._computed(session)
            tokens = (*session.tokens[computed:], *drafted)
            rows = len(drafted) + 1
            if drafted and chain[0].draft.write is None and not session.wants_token_after(chain):
                # The last token is computed with what follows it, as the last committed one always is.
                tokens, rows = tokens[:-1], len(drafted)
            item = Item(session.handle, tokens, rows, stable=session.policy.repeats)
            self._add(session, item, chain, background=background)
            if chain[0].draft.write is not None and session.constraint is not None:
                self._forced += len(drafted)
            return len(tokens)
        return self._prefill(session, allowance, background=background)

    def _prefills(self, behind: Sequence[EdgeSession], most: int, *, background: bool = False) -> int:
        """Add prompts, sessions taking turns to be first; return the tokens to compute."""
        left = most
        for session in sorted(behind, key=lambda session: self.used.get(session.handle, 0)):
            if left <= 0:
                break
            if session.handle in self._computing:
                continue
            taken = self._in_turn(session, left, background=background)
            left -= self._prefill(session, left, background=background) if taken is None else taken
        return most - left

    def _prefill(self, session: EdgeSession, most: int, *, background: bool) -> int:
        """Add the first part of a session's backlog; return the tokens to compute."""
        computed, scored = self._computed(session), tuple[int, ...]()
        if session.unscored:
            most = min(most, _MAX_SCORED - self._scored)
        end = min(computed + most, len(session.tokens) - 1)
        tokens = tuple(session.tokens[computed:end])
        if session.unscored:
            # A row is of the next token; after an eviction some are scored already.
            scored = tuple(session.tokens[len(session.prompt_logprobs) + 1 : end + 1])
            self._scored += len(scored)
        if tokens:
            item = Item(session.handle, tokens, len(scored), stable=session.policy.repeats)
            self._add(session, item, scored=scored, background=background)
        return len(tokens)

    def _in_turn(self, session: EdgeSession, most: int, *, background: bool) -> int | None:
        """Reuse what others have computed of a session's prompt, or let one that is about to compute it go first.

        Returns the tokens to compute instead of the session's own; None to compute the session itself.
        """
        if self._backlog(session) < LEAST_REUSED or session.unscored:
            return None
        ahead = self.cache.ahead(session.handle, computing=self._computing, able=self._able)
        if ahead is None:
            self._reuse(session)
            return None
        first, common = ahead
        if first in self._computing:
            return 0
        return self._prefill(self._able[first], min(most, common - self.cache.computed(first)), background=background)

    def _reuse(self, session: EdgeSession) -> None:
        if session.unscored:
            return  # what others have computed has no logits
        session.counters.reused_tokens += self.cache.reuse(session.handle)

    def _add(
        self,
        session: EdgeSession,
        item: Item,
        chain: tuple[ReceivedDraft, ...] = (),
        *,
        scored: tuple[int, ...] = (),
        background: bool,
    ) -> None:
        self.cache.truncate(session.handle, self._computed(session))
        work = WorkItem(session, item, chain, background=background, scored=scored)
        self.batch.works.append(work)
        self._computing.add(session.handle)

    def _backlog(self, session: EdgeSession) -> int:
        """Return how many tokens to compute before the last one, which is computed with a draft."""
        return len(session.tokens) - 1 - self._computed(session)

    def _computed(self, session: EdgeSession) -> int:
        return min(self.cache.computed(session.handle), len(session.tokens) - 1)
