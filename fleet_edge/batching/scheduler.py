"""Scheduler: build batches, evict KV memory, run the verifier and keep track of step times.

A session has known tokens and computed tokens; a step computes some of the difference. Prefill, resumption after an
eviction and verification differ only in whether rows of logits are wanted at the end.
"""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from fleet_edge.batching.batch_builder import BatchBuilder, Budget, max_prompts_s
from fleet_edge.batching.edge_draft import EdgeDrafter, TargetDrafter, with_proposed
from fleet_edge.batching.fairness import ExtraWork, MemoryTurns
from fleet_edge.batching.prompt_wait import PromptWait, WaitingPrompt, estimate_waits
from fleet_edge.batching.step_cost import RunningRequests, StepCost
from fleet_edge.batching.steps import Batch, DraftOrder, StepPolicy, StepReport, StepTimes, WorkItem
from fleet_edge.batching.warm_prompts import WarmPrompts
from fleet_edge.sessions.drafts import DraftResult
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.settings import PrefixSharing
from fleet_edge.verifiers.contract import DraftsItself, Logits, TargetInfo, Verifier
from fleet_edge.verifiers.prefix_cache import PrefixCache
from schemas.fields import EdgeLoad

_log = logging.getLogger(__name__)

_MAX_REQUESTS: Final = (1 << 16) - 1
_SMOOTHING: Final = 0.3
_MARGIN: Final = 1.25
"""How much longer than its mean turnaround to wait for a device."""

_PATIENCE: Final = 3.0
"""Number of mean turnarounds for which a device is expected."""

_MIN_PATIENCE_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class KvMemory:
    """KV memory in tokens: computed for open sessions, retained of ended ones (evicted on demand), and free."""

    computed: int = 0
    retained: int = 0
    free: int = 0

    @property
    def whole(self) -> int:
        return self.computed + self.retained + self.free


@dataclass(slots=True)
class PrefillLog:
    """Steps that computed each session's prompt, as far back as a draft may have waited for them."""

    _steps: dict[int, list[StepTimes]] = field(default_factory=dict)

    def on_step(self, report: StepReport) -> None:
        for work in report.batch.works:
            if work.chain:
                self.drop(work.session.handle, before=min(arrived.at for arrived in work.chain))
            else:
                self.add(work.session.handle, report.times)

    def add(self, handle: int, step: StepTimes) -> None:
        self._steps.setdefault(handle, []).append(step)

    def drop(self, handle: int, *, before: float) -> None:
        """Drop steps that ended before the oldest verified draft arrived."""
        if handle in self._steps:
            self._steps[handle] = [step for step in self._steps[handle] if step.ended > before]

    def forget(self, handle: int) -> None:
        self._steps.pop(handle, None)

    def timed(self, result: DraftResult, step: StepTimes) -> DraftResult:
        """Return the result on a draft in `step` with its times."""
        arrived = result.arrived
        prefill_s = sum(
            max(0.0, min(each.ended, step.started) - max(each.started, arrived.at))
            for each in self._steps.get(arrived.draft.handle, ())
        )
        return replace(
            result,
            batch=step.sessions,
            queue_ms=max(0.0, step.started - arrived.at - prefill_s) * 1e3,
            prefill_ms=prefill_s * 1e3,
            compute_ms=step.compute_ms,
        )


@dataclass(slots=True)
class BatchingDelay:
    """Holds a step for drafts that are about to arrive, where that pays.

    A step costs nearly as much for one session as for a few, and a session that just misses a step waits for a whole
    one: quick devices fall into two groups that take turns in half-empty steps. So a step is held for devices due
    within `share` of a step (by their measured turnaround), if they save more than the ready ones lose; 0 never holds.
    """

    share: float = 0.5
    _answered: dict[int, float] = field(default_factory=dict)
    _turnaround: dict[int, float] = field(default_factory=dict)

    @property
    def expects_drafts(self) -> bool:
        return bool(self._answered)

    def expect_draft(self, handle: int, *, at: float) -> None:
        """Record a verdict after which the session's device drafts again."""
        self._answered[handle] = at

    def on_draft(self, handle: int, *, at: float) -> None:
        since = self._answered.pop(handle, None)
        if since is not None:
            took = max(0.0, at - since)
            before = self._turnaround.get(handle, took)
            self._turnaround[handle] = before + _SMOOTHING * (took - before)

    def forget(self, handle: int) -> None:
        self._answered.pop(handle, None)
        self._turnaround.pop(handle, None)

    def gap_s(self, *, now: float) -> float:
        """Return how long no draft is likely to arrive: infinity if none is expected.

        0 if one is overdue, or due from a device that has not been measured.
        """
        gap_s = math.inf
        for handle, at in self._answered.items():
            turnaround_s = self._turnaround.get(handle, 0.0)
            if now - at <= max(_MIN_PATIENCE_S, _PATIENCE * turnaround_s):
                gap_s = min(gap_s, max(0.0, at + turnaround_s - now))
        return gap_s

    def hold_s(self, ready: int, *, now: float, step_s: float) -> float:
        """Return how long to hold a step of about `step_s` for which `ready` sessions wait, in seconds."""
        if ready == 0 or not self._answered:
            return 0.0
        due = sorted(
            self._answered[handle] + _MARGIN * self._turnaround[handle] - now
            for handle in self._answered
            if handle in self._turnaround
        )
        best, gain = 0.0, 0.0
        for late, wait in enumerate((wait for wait in due if 0.0 < wait <= self.share * step_s), start=1):
            # Sessions that arrive in time save about a step; ready ones lose the wait.
            saved = late * step_s - ready * wait
            if saved > gain:
                best, gain = wait, saved
        return best


class Scheduler:
    """Build batches, evict KV blocks, run the verifier and record step times.

    Times are monotonic seconds. Thread safety: call `score` from any thread between `begin_step` and `end_step`; call
    everything else from one thread. Nothing else may call the verifier.
    """

    def __init__(
        self,
        verifier: Verifier,
        budget: Budget | None = None,
        *,
        kv_share: Callable[[str], float] = lambda _device: 1.0,
        spend_prompts: Callable[[str, float], None] = lambda _device, _seconds: None,
        sharing: PrefixSharing = PrefixSharing.OFF,
        cost: StepCost | None = None,
        drafter: EdgeDrafter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._verifier = PrefixCache(verifier, sharing=sharing, share=kv_share, clock=clock)
        self.warm = WarmPrompts(self._verifier, clock)
        self._budget = budget or Budget()
        self._delay = BatchingDelay()
        self._extra = ExtraWork()
        self._cost = cost or StepCost(verifier.info.min_step_tokens)
        self._running = RunningRequests()
        self._load: EdgeLoad | None = None  # None after a change
        self._drafter = TargetDrafter(self._verifier) if isinstance(verifier, DraftsItself) else drafter
        self._policies: list[StepPolicy] = [self._cost, self._running]
        if self._drafter is not None:
            self._policies.append(self._drafter)
        self._kv_share = kv_share
        self._spend_prompts = spend_prompts
        self._prefill_log = PrefillLog()
        self._turns = MemoryTurns()
        self._used: dict[int, int] = {}
        self._evicted: set[int] = set()  # evicted and not computed since
        self._clock = 0
        self._shortest_first = False  # alternates with each step that has prompts
        self._computing = False
        self._memory = KvMemory()
        self._later: deque[Callable[[], None]] = deque()  # calls to the verifier after the step

    @property
    def target(self) -> TargetInfo:
        return self._verifier.info

    def load(self) -> EdgeLoad:
        """Return the load and step times; the same object until they change."""
        if self._load is None:
            requests = max(1, self._running.count)
            parts = self._cost.parts(requests)
            self._load = EdgeLoad(
                requests=min(requests, _MAX_REQUESTS),
                writing_ms=_ms(parts.writing_s),
                step_ms=_ms(parts.step_s),
                request_ms=_ms(parts.request_s),
                token_ms=_ms(parts.token_s),
                free=self._cost.least - 1,
            )
        return self._load

    @property
    def memory(self) -> "KvMemory":
        """KV memory as of the last `note_memory`."""
        return self._memory

    def note_memory(self, sessions: Iterable[EdgeSession], *, then: Callable[[], None]) -> None:
        """Measure the KV memory as soon as no step is running, then call `then`."""

        def look() -> None:
            computed = sum(self._verifier.computed(each.handle) for each in sessions if each.handle in self._used)
            self._memory = KvMemory(computed, self._verifier.retained_tokens, self._verifier.capacity())
            then()

        self._between_steps(look)

    def expire_prefixes(self) -> None:
        """Drop what ended sessions have computed and nobody has used for a day; call it every few seconds."""
        self._between_steps(self._verifier.expire)

    def away(self) -> str:
        return self._verifier.away()

    # Sessions

    def on_open(self, session: EdgeSession) -> None:
        tokens = tuple(session.tokens)
        self._running.on_open(session.handle)
        self._load = None
        self._between_steps(lambda: self._open(session, tokens))

    def on_draft(self, session: EdgeSession, *, at: float) -> None:
        self._delay.on_draft(session.handle, at=at)

    def expect_draft(self, session: EdgeSession, *, at: float) -> None:
        """Expect another draft after a verdict, unless the generation has ended."""
        if not session.finished:
            self._delay.expect_draft(session.handle, at=at)

    def longest_draft(self, device: str, most: int) -> int:
        """Return the longest draft to grant a device's next session, at most `most` tokens."""
        return self._extra.longest_draft(device, most)

    def evict(self, session: EdgeSession) -> None:
        self._evict(session.handle)

    def forget(self, session: EdgeSession) -> None:
        """Forget an ended session; what it has computed is kept as long as there is room."""
        self._used.pop(session.handle, None)
        self._evicted.discard(session.handle)
        self._delay.forget(session.handle)
        self._prefill_log.forget(session.handle)
        self._turns.end(session.handle)
        self._running.forget(session.handle)
        self._load = None
        self._between_steps(lambda: self._close(session.handle))

    # Steps

    def hold_s(self, sessions: Iterable[EdgeSession], *, now: float) -> float:
        """Return how long to hold the next step for drafts that are about to arrive, in seconds."""
        if not self._delay.expects_drafts:
            return 0.0
        ready = sum(session.ready is not None for session in sessions)
        return self._delay.hold_s(ready, now=now, step_s=self._cost.recent_s)

    def next_batch(self, sessions: Iterable[EdgeSession], *, now: float) -> Batch:
        sessions = list(sessions)
        builder = BatchBuilder(
            self._verifier,
            self._budget,
            self._extra,
            self._cost,
            self._used,
            now,
            prompts_s=max_prompts_s(self._cost.mean_s),
            shortest_first=self._shortest_first,
            gap_s=self._delay.gap_s(now=now),
        )
        batch = builder.build(sessions, evicted=self._evicted)
        self._make_room(batch, sessions, now=now)
        return batch

    def begin_step(self) -> None:
        """Mark the start of a step: until `end_step` only `score` uses the verifier."""
        self._computing = True

    def end_step(self) -> None:
        """Mark the end of the step, and run the verifier calls deferred meanwhile."""
        self._computing = False
        while self._later:
            try:
                self._later.popleft()()
            except Exception:  # noqa: BLE001 - logged with its traceback
                # One session must not stop the service of all others.
                _log.exception("A request of a session could not be passed to the target model.")

    def order_drafts(self, batch: Batch) -> list[DraftOrder]:
        """Return the drafts to make for a step, none if they would not fit into it."""
        orders = [] if self._drafter is None else self._drafter.order(batch)
        longer = {order.handle: (0,) * order.most for order in orders}
        return orders if self._verifier.fits(with_proposed(batch, longer).items) else []

    def propose(self, orders: Sequence[DraftOrder]) -> dict[int, tuple[int, ...]]:
        """Return proposed tokens by session. Call it as `score`, before it."""
        return self._drafter.propose(orders) if self._drafter is not None and orders else {}

    def score(self, batch: Batch) -> Logits:
        """Compute a step. Call it on any thread, between `begin_step` and `end_step`.

        Returns float32 logits `[sum of rows, vocabulary]` of the verifications, in order; valid until the next step.
        Raises `VerifierError` if nothing was computed: `TargetAway`, or `SequenceFailed` for one session.
        """
        return self._verifier.score(batch.items)

    def on_step(self, report: StepReport) -> None:
        """Hand a step to all policies, before its sessions commit."""
        for policy in self._policies:
            policy.on_step(report)
        self._load = None
        self._shortest_first ^= report.batch.prefilled > 0
        self._extra.on_step(report, self._cost)
        token_s = report.times.seconds / max(1, report.batch.tokens)
        for work in report.batch.works:
            if work.prefilled:  # next to others as long as it lengthens the step
                prompt_s = min(token_s, self._cost.prompt_token_s or token_s)
                self._spend_prompts(work.session.device, prompt_s * work.prefilled)
        still_open = report.of(self._used)
        self._turns.on_step(still_open)
        self._prefill_log.on_step(still_open)
        for work in still_open.batch.works:
            self._evicted.discard(work.session.handle)
            if work.prefilled:
                work.session.counters.prefill_tokens += work.prefilled

    def on_commit(self, work: WorkItem, *, committed: int) -> None:
        self._cost.add_committed(committed)
        # The device does not pay for what the edge has speculated.
        computed = work.item.rows - work.speculated
        self._extra.count_drafts(work.session.device, computed=computed, committed=committed)

    def progress(self, sessions: Iterable[EdgeSession], *, now: float) -> list[tuple[EdgeSession, float, PromptWait]]:
        """Return the sessions that wait for a verdict, since when, and for what."""
        unfinished = [session for session in sessions if not session.finished]
        waits = self._estimate([self._waiting(session) for session in unfinished], now=now)
        pairs = zip(unfinished, waits, strict=True)
        return [(session, session.ready.at, wait) for session, wait in pairs if session.ready is not None]

    def wait_of_new(
        self, sessions: Iterable[EdgeSession], device: str, tokens: Sequence[int], *, stable: bool, now: float
    ) -> PromptWait:
        """Return the work before the first token of a session that is opened now."""
        own = len(tokens) - self._verifier.known(tokens, owner=device, stable=stable)
        others = [self._waiting(session) for session in sessions if not session.finished]
        return next(self._estimate([WaitingPrompt(device, now, own), *others], now=now))

    def _estimate(self, prompts: Sequence[WaitingPrompt], *, now: float) -> Iterator[PromptWait]:
        return estimate_waits(prompts, self._cost, self._extra, now=now)

    def _waiting(self, session: EdgeSession) -> WaitingPrompt:
        left = max(1, len(session.tokens) - self._verifier.reusable(session.handle))
        return WaitingPrompt(session.device, math.inf if session.ready is None else session.ready.at, left)

    def timed(self, work: WorkItem, results: Sequence[DraftResult], step: StepTimes) -> WorkItem:
        """Return the work of a step with what it has decided, and with the times of the verdicts."""
        drafted = sum(len(each.draft.tokens) for each in work.chain)
        timed = [
            replace(
                self._prefill_log.timed(result, step),
                background=work.background,
                chained=drafted - len(result.arrived.draft.tokens),
            )
            for result in results
        ]
        return replace(work, results=tuple(timed))

    # Internal

    def _make_room(self, batch: Batch, sessions: Sequence[EdgeSession], *, now: float) -> None:
        """Evict sessions until the step fits, or leave parts of it out.

        Idle sessions go first: of devices above their share, then the least recently used. Busy sessions take turns.
        """
        self._clock += 1
        for work in batch.works:
            self._used[work.session.handle] = self._clock
        if self._verifier.fits(batch.items):
            return
        self.warm.release()
        busy = {item.sequence for item in batch.items}
        greedy = self._above_their_share(sessions)
        idle, in_turn = list[int](), list[int]()
        for session in sorted(sessions, key=lambda s: (s.device not in greedy, self._used.get(s.handle, 0))):
            if session.handle not in busy and self._verifier.computed(session.handle):
                lasts = session.device not in greedy and self._turns.lasts(session.handle, now=now)
                (in_turn if lasts else idle).append(session.handle)
        while idle and not self._verifier.fits(batch.items):
            self._evict(idle.pop(0))
        self._take_turns(batch, now=now)
        idle += in_turn
        while not self._verifier.fits(batch.items):
            if idle:
                self._evict(idle.pop(0))
            elif len(batch.works) > 1:
                item = self._leave_out(batch, batch.works[-1]).item
                if self._verifier.computed(item.sequence):
                    idle.append(item.sequence)  # its computed tokens may have to go too
            else:
                break  # one session alone: the verifier raises

    def _take_turns(self, batch: Batch, *, now: float) -> None:
        """Let sessions without computed tokens wait, the last first, until the turn of another is over."""
        while not self._verifier.fits(batch.items):
            here = [work for work in batch.works if self._verifier.computed(work.session.handle)]
            coming = [work for work in batch.works if work not in here]
            if not here or not coming:
                return
            over = [work for work in here if not self._turns.lasts(work.session.handle, now=now)]
            if over:
                longest = min(over, key=lambda work: self._turns.balance(work.session.handle))
                self._evict(self._leave_out(batch, longest).session.handle)
            else:
                self._leave_out(batch, coming[-1])

    def _leave_out(self, batch: Batch, work: WorkItem) -> WorkItem:
        batch.works.remove(work)
        return work

    def _above_their_share(self, sessions: Iterable[EdgeSession]) -> set[str]:
        held = Counter[str]()
        for session in sessions:
            held[session.device] += self._verifier.computed(session.handle)
        whole = self._verifier.capacity() + held.total() + self._verifier.retained_tokens
        return {device for device, tokens in held.items() if tokens > self._kv_share(device) * whole}

    def _between_steps(self, call: Callable[[], None]) -> None:
        if self._computing:
            self._later.append(call)
        else:
            call()

    def _close(self, handle: int) -> None:
        self._verifier.close(handle)
        if self._drafter is not None:
            self._drafter.forget(handle)

    def _open(self, session: EdgeSession, tokens: Sequence[int]) -> None:
        self._verifier.open(session.handle)
        self._verifier.expect(session.handle, tokens, owner=session.device, stable=session.policy.repeats)

    def _evict(self, handle: int) -> None:
        self._verifier.evict(handle)
        self._evicted.add(handle)
        self._turns.end(handle)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
