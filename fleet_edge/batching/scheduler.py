"""Scheduler: which sessions the next forward pass computes, and how many tokens of each.

A session has tokens it knows and tokens it has computed; a step computes some of the difference. Prefill, resumption
after eviction and verification differ in nothing but whether rows of logits are wanted at the end. Verification comes
first, oldest draft first; what is left of the step's token budget goes to prefill, a chunk in all while anybody is
being verified, so that no prompt delays a verdict by more than that. What may wait (see `background`) comes last, and
not in every step. A step may exceed its budget by the last draft that it takes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from fleet_edge.batching.background import BackgroundWork
from fleet_edge.batching.delay import BatchingDelay
from fleet_edge.batching.timing import DraftTiming, PrefillLog, Step
from fleet_edge.errors import DraftFault
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.sessions.waiting import ReceivedDraft
from fleet_edge.verifiers.contract import Item, Logits, RunsElsewhere, TargetInfo, Verifier
from schemas.messages import Draft

__all__ = ["Batch", "Budget", "Scheduler", "Work"]


@dataclass(frozen=True, slots=True)
class Budget:
    """How much one step may compute.

    Attributes:
        tokens: Most new tokens in a step.
        prefill_chunk: Most tokens of prefill, and of what else may wait, in a step while anybody is being verified.
        device_share: Most of a step's tokens for one device while others wait, as a fraction.
    """

    tokens: int = 512
    prefill_chunk: int = 128
    device_share: float = 0.5


@dataclass(frozen=True, slots=True)
class Work:
    """One session's part of a step.

    Attributes:
        session: Whose.
        item: What the verifier is to compute.
        chain: The drafts that it decides; empty for prefill.
        background: Whether it might have waited.
    """

    session: EdgeSession
    item: Item
    chain: tuple[ReceivedDraft, ...] = ()
    background: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """A step.

    Attributes:
        works: Its parts, the most urgent first: where there is not room for all, the last is left out.
        faults: Drafts that turned out to be void when their turn came.
    """

    works: list[Work] = field(default_factory=list)
    faults: list[tuple[EdgeSession, Draft, DraftFault]] = field(default_factory=list)

    @property
    def verifications(self) -> list[Work]:
        """Parts that end in verdicts, in the order of their rows."""
        return [work for work in self.works if work.chain]

    @property
    def items(self) -> list[Item]:
        """What the verifier is to compute."""
        return [work.item for work in self.works]

    def __bool__(self) -> bool:
        return bool(self.works or self.faults)


class Scheduler:
    """Owns the verifier: picks the next step, makes room for it, has it computed, and knows what it took.

    It is told of what concerns a session: opened, draft arrived, answered, ended. Times are monotonic seconds.

    Args:
        verifier: The target model; nobody else calls it.
        budget: Of a step.
        delay: Whether to hold a step for drafts that are about to come.
        background: What may wait, and how much of it runs.
        kv_share: Which part of the memory for keys and values a device may hold while others need some.
    """

    def __init__(
        self,
        verifier: Verifier,
        budget: Budget | None = None,
        *,
        delay: BatchingDelay | None = None,
        background: BackgroundWork | None = None,
        kv_share: Callable[[str], float] = lambda _device: 1.0,
    ) -> None:
        self._verifier = verifier
        self._budget = budget or Budget()
        self._delay = delay or BatchingDelay()
        self._background = background or BackgroundWork()
        self._kv_share = kv_share
        self._prefill_log = PrefillLog()
        self._used: dict[int, int] = {}
        self._evicted: set[int] = set()  # and not computed since
        self._clock = 0

    @property
    def target(self) -> TargetInfo:
        """The target model that sessions are verified with."""
        return self._verifier.info

    def away(self) -> str:
        """Return why the target model cannot compute now, in a sentence; empty if it can."""
        return self._verifier.away() if isinstance(self._verifier, RunsElsewhere) else ""

    # Sessions

    def opened(self, session: EdgeSession) -> None:
        """A session begins, with nothing computed."""
        self._verifier.open(session.handle)

    def arrived(self, session: EdgeSession, *, at: float) -> None:
        """A draft of the session has come."""
        self._delay.arrived(session.handle, at=at)

    def answered(self, session: EdgeSession, *, at: float) -> None:
        """The session has got a verdict; if its text goes on, a draft will come."""
        if not session.finished:
            self._delay.answered(session.handle, at=at)

    def longest_draft(self, device: str, most: int) -> int:
        """Return how long the drafts of a device's next session may be, of `most` tokens that are granted otherwise."""
        return self._background.longest_draft(device, most)

    def evict(self, session: EdgeSession) -> None:
        """Drop a session's keys and values; its tokens stay known and are computed again when needed."""
        self._evict(session.handle)

    def forget(self, session: EdgeSession) -> None:
        """A session has ended."""
        self._used.pop(session.handle, None)
        self._evicted.discard(session.handle)
        self._delay.forget(session.handle)
        self._prefill_log.forget(session.handle)
        self._verifier.close(session.handle)

    # Steps

    def hold_s(self, sessions: Iterable[EdgeSession], *, now: float) -> float:
        """Return how long to hold the next step for drafts that are about to come, in seconds."""
        return self._delay.hold_s(sum(session.ready is not None for session in sessions), now=now)

    def next_batch(self, sessions: Iterable[EdgeSession], *, now: float) -> Batch:
        """Return the next step; empty if there is nothing to do, or nothing that may not wait."""
        batch = Batch()
        sessions = list(sessions)
        ready = sorted(
            ((arrived.at, session.handle, session) for session in sessions if (arrived := session.ready)),
            key=lambda entry: entry[:2],
        )
        due, may_wait = list[EdgeSession](), list[EdgeSession]()
        for _, _, session in ready:
            (may_wait if self._may_wait(session, now) else due).append(session)
        left = self._budget.tokens
        left -= self._verifications(due, left, batch, now=now)
        # An evicted session waits for a draft that needs it: if it was computed anew at once, sessions that do not all
        # fit would evict each other for ever.
        behind = [
            session
            for session in sessions
            if session.ready is None and not session.finished and session.handle not in self._evicted
        ]
        at_once = [session for session in behind if self._background.has_credit(session.device, now)]
        hurried = bool(batch.verifications) or self._background.others_active(now)
        chunk = min(left, self._budget.prefill_chunk) if hurried else left
        chunk -= self._prefills(at_once, chunk, batch, now=now)
        if self._background.may_run(now):
            credited = {session.handle for session in at_once}
            chunk -= self._verifications(may_wait, chunk, batch, now=now, background=True)
            rest = [session for session in behind if session.handle not in credited]
            self._prefills(rest, chunk, batch, now=now, background=True)
        self._make_room(batch, sessions)
        return batch

    def score(self, batch: Batch) -> Logits:
        """Compute a step.

        Returns:
            float32 logits `[sum of rows, vocabulary size]` of the verifications, in order; valid until the next step
            is computed.

        Raises:
            TargetAway: What computes is away.
            SequenceFailed: One session cannot be computed.
            VerifierError: Nothing was computed, in these cases too.
        """
        return self._verifier.score(batch.items)

    def computed(self, batch: Batch, step: Step) -> None:
        """A batch has been computed and its drafts decided on; the sessions' answers come next."""
        if step.sessions:
            self._delay.stepped(step.ended - step.started)
        self._background.stepped(
            started=step.started,
            ended=step.ended,
            tokens=sum(len(work.item.tokens) for work in batch.works),
            background=sum(len(work.item.tokens) for work in batch.works if work.background),
            verified=any(work.chain and not work.background for work in batch.works),
        )
        for work in batch.works:
            self._evicted.discard(work.session.handle)
            if work.chain:
                self._prefill_log.verified(work.session.handle, oldest=min(arrived.at for arrived in work.chain))
            else:
                self._prefill_log.computed(work.session.handle, step)

    def judged(self, work: Work, *, committed: int) -> None:
        """A session's part of a step was decided on, and its text has grown by so many tokens."""
        self._background.judged(work.session.device, computed=work.item.rows, committed=committed)

    def timing(self, work: Work, arrived: ReceivedDraft, step: Step) -> DraftTiming:
        """Return what the verdict on a draft took that a part of the step has verified."""
        return replace(self._prefill_log.timing(arrived, step), background=work.background)

    # Within

    def _may_wait(self, session: EdgeSession, now: float) -> bool:
        """Whether a session's draft may wait for those of others."""
        device = session.device
        if self._background.wasteful(device):
            return True
        backlog = len(session.tokens) - 1 - self._computed(session)
        return backlog > 0 and not self._background.has_credit(device, now)

    def _verifications(
        self, due: Sequence[EdgeSession], most: int, batch: Batch, *, now: float, background: bool = False
    ) -> int:
        """Add drafts that are due, the oldest first, no device more than its share; return the tokens to compute."""
        left, share = most, Counter[str]()
        most_per_device = max(1, int(most * self._budget.device_share)) if len(due) > 1 else most
        for session in due:
            allowance = min(left, most_per_device - share[session.device])
            if allowance <= 0:
                continue
            taken = self._verification(session, allowance, batch, now=now, background=background)
            left -= taken
            share[session.device] += taken
        return most - left

    def _verification(self, session: EdgeSession, allowance: int, batch: Batch, *, now: float, background: bool) -> int:
        """Add a session's drafts, or the part of its backlog that comes first; return the tokens to compute."""
        first = session.ready
        try:
            chain = session.chain(allowance)
        except DraftFault as fault:
            assert first is not None
            batch.faults.append((session, first.draft, fault))
            return 0
        drafted = [token for arrived in chain for token in arrived.draft.tokens]
        # The last committed token is always computed anew: its row decides on the first draft token.
        computed = self._computed(session)
        backlog = len(session.tokens) - 1 - computed
        if chain and backlog + 1 + len(drafted) <= max(allowance, 1 + len(drafted)):
            self._verifier.truncate(session.handle, computed)
            tokens = (*session.tokens[computed:], *drafted)
            item = Item(session.handle, tokens, len(drafted) + 1)
            batch.works.append(Work(session, item, chain, background=background))
            self._background.prefilled(session.device, backlog, now)
            return len(tokens)
        return self._prefill(session, allowance, batch, now=now, background=background)

    def _prefills(
        self, behind: Sequence[EdgeSession], most: int, batch: Batch, *, now: float, background: bool = False
    ) -> int:
        """Add prompts, the sessions taking turns to be first; return the tokens to compute."""
        left = most
        for session in sorted(behind, key=lambda session: self._used.get(session.handle, 0)):
            if left <= 0:
                break
            left -= self._prefill(session, left, batch, now=now, background=background)
        return most - left

    def _prefill(self, session: EdgeSession, most: int, batch: Batch, *, now: float, background: bool) -> int:
        computed = self._computed(session)
        tokens: Sequence[int] = session.tokens[computed : min(computed + most, len(session.tokens) - 1)]
        if not tokens:
            return 0
        self._verifier.truncate(session.handle, computed)
        batch.works.append(Work(session, Item(session.handle, tuple(tokens), 0), background=background))
        self._background.prefilled(session.device, len(tokens), now)
        return len(tokens)

    def _computed(self, session: EdgeSession) -> int:
        return min(self._verifier.computed(session.handle), len(session.tokens) - 1)

    def _make_room(self, batch: Batch, sessions: Iterable[EdgeSession]) -> None:
        """Evict idle sessions until the step fits; if none is idle, leave out its end.

        Those of devices that hold more than their share go first, then those unused for longest.
        """
        self._clock += 1
        for work in batch.works:
            self._used[work.session.handle] = self._clock
        if self._verifier.fits(batch.items):
            return
        busy = {item.sequence for item in batch.items}
        greedy = self._above_their_share(sessions)
        idle = [
            session.handle
            for session in sorted(sessions, key=lambda s: (s.device not in greedy, self._used.get(s.handle, 0)))
            if session.handle not in busy and self._verifier.computed(session.handle)
        ]
        while not self._verifier.fits(batch.items):
            if idle:
                self._evict(idle.pop(0))
            elif len(batch.works) > 1:
                item = batch.works.pop().item
                if self._verifier.computed(item.sequence):
                    idle.append(item.sequence)  # what it has computed may have to go too
            else:
                break  # one session alone: the verifier says so itself

    def _above_their_share(self, sessions: Iterable[EdgeSession]) -> set[str]:
        """Return the devices that hold more of the memory for keys and values than they may."""
        held = Counter[str]()
        for session in sessions:
            held[session.device] += self._verifier.computed(session.handle)
        whole = self._verifier.capacity() + held.total()
        return {device for device, tokens in held.items() if tokens > self._kv_share(device) * whole}

    def _evict(self, handle: int) -> None:
        self._verifier.close(handle)
        self._verifier.open(handle)
        self._evicted.add(handle)
