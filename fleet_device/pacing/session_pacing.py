"""Pacing of one session: request a plan before each draft and report its outcome."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fleet_device.drafters.suffix.drafter import SuffixDrafter
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import STREAMED, DraftOutcome, EdgeLoad, FixedPacing, Pacing, Plan
from fleet_device.session.in_flight import DecidedDraft, VerdictEffect
from fleet_device.session.machine import DeviceSession
from fleet_device.settings import AUTO, NO_DRAFTER, DeviceSettings
from schemas import edge_load
from schemas.messages import Draft, Opened


@dataclass(slots=True)
class RoundTrips:
    """Times from a draft to its verdict.

    Attributes:
        count: Number of drafts.
        total_ms: Sum in milliseconds.
    """

    count: int = 0
    total_ms: float = 0.0

    @property
    def mean_ms(self) -> float | None:
        """Mean in milliseconds, or None before the first verdict."""
        return self.total_ms / self.count if self.count else None

    def add(self, took_ms: float) -> None:
        self.count += 1
        self.total_ms += took_ms


@dataclass(slots=True)
class SessionPacing:
    """Drafting of one session.

    Attributes:
        session: The session; it counts drafting time.
        pacing: Decides and learns.
        clock: Monotonic seconds.
        source: Suffix index, if the device uses one.
        drafts: Number of drafts sent, each counted once.
        round_trips: Times of answered drafts.
    """

    session: DeviceSession
    pacing: Pacing
    clock: Callable[[], float]
    source: SuffixDrafter | None = None
    drafts: int = 0
    round_trips: RoundTrips = field(default_factory=RoundTrips)
    _opened: Opened | None = None  # that the pacing has been told of
    _piece_at: float | None = None  # when the last piece came of what the edge writes without a pause
    _repeated: set[int] = field(default_factory=set)  # rounds whose drafts were made from earlier text
    _draft_ms: float = 0.0  # the session's count when the draft being built was begun

    def plan(self) -> Plan:
        """Return the plan of the next draft."""
        opened = self.session.opened
        assert opened is not None
        self.begin()
        if opened is not self._opened:
            if opened.load is not None:
                self.pacing.note_load(_load(opened.load))
            self._opened = opened
        longest, window, source = opened.max_draft, opened.window, self.source
        plan = self.pacing.plan(longest=longest, window=window)
        if source is not None:
            prospect = source.prospect(self.session.request.policy)
            if prospect is not None:
                plan = self.pacing.weigh(plan, prospect, longest=longest, window=window)
            source.take(repeats=plan.repeats, least=plan.least)
        return plan

    def goes_on(self, plan: Plan) -> bool:
        """Return whether to draft another token of a plan."""
        chances = self.session.chances
        return not plan.may_stop or not chances or self.pacing.goes_on(chances)

    def begin(self) -> None:
        """Begin a draft; discard the one in progress."""
        self._draft_ms = self.session.counters.draft_ms
        if self.source is not None:
            self.source.caught_up_s()

    def send(self, *, ahead: bool) -> Draft:
        """Send the draft in progress.

        Args:
            ahead: Announce another draft before the verdict, if there is room.
        """
        self.drafts += 1
        draft_s = (self.session.counters.draft_ms - self._draft_ms) / 1e3
        if self.source is not None:
            # Reading tokens that the draft model has not drafted does not count as drafting time.
            draft_s = max(0.0, draft_s - self.source.caught_up_s())
        draft = self.session.send(more=ahead and self.session.may_draft_ahead, at=self.clock(), draft_s=draft_s)
        if self.source is not None and self.source.repeats:
            self._repeated.add(draft.round)
            self.session.counters.suffix_drafted += len(draft.tokens)
        return draft

    def learn(self, effects: Iterable[VerdictEffect]) -> None:
        """Record verdicts, in the order of the drafts; a verdict on an empty draft teaches nothing."""
        for effect in effects:
            for verdict in (effect.piece, effect.decided and effect.decided.verdict):
                if verdict and verdict.load is not None:
                    self.pacing.note_load(_load(verdict.load))
            if effect.streamed:
                self._learn_streamed(effect)
            if effect.decided is not None and effect.decided.draft.tried is None:
                self._learn(effect.decided)

    def stream(self, tokens: int) -> Draft:
        """Request edge-only decoding of a number of tokens; 0 stops it."""
        if not self.session.streaming:
            self._piece_at = None
        return self.session.stream(tokens)

    def _learn_streamed(self, effect: VerdictEffect) -> None:
        if not effect.tokens:
            return
        now, before = self.clock(), self._piece_at
        # The time of the first piece includes the request; so does the next one after a repeated request.
        if before is not None:
            step_s = 0.0 if effect.piece is None else effect.piece.compute_ms / 1e3
            self.pacing.streamed(len(effect.tokens), now - before, step_s=step_s)
        self._piece_at = now if self.session.streaming else None

    def _learn(self, decided: DecidedDraft) -> None:
        sent, verdict = decided.sent, decided.verdict
        tokens = len(sent.draft.tokens)
        if verdict.accepted < tokens:
            self.begin()
        repeated = sent.draft.round in self._repeated
        if repeated:
            self._repeated.discard(sent.draft.round)
            self.session.counters.suffix_tested += min(tokens, verdict.accepted + 1)
            self.session.counters.suffix_accepted += verdict.accepted
        answer_s = self.clock() - sent.at
        self.round_trips.add(answer_s * 1e3)
        self.pacing.learn(
            DraftOutcome(
                tokens=tokens,
                ahead=sent.draft.more,
                accepted=verdict.accepted,
                token_s=sent.draft_s / tokens if tokens else 0.0,
                answer_s=answer_s,
                compute_s=verdict.compute_ms / 1e3,
                opening=sent.first,
                chances=tuple(proposal.chance for proposal in sent.proposals),
                queue_s=verdict.queue_ms / 1e3,
                chained=verdict.chained or 0,
                repeats=repeated and self.source is not None and self.source.model is not None,
            )
        )


def _load(told: edge_load.EdgeLoad) -> EdgeLoad:
    times = (told.writing_ms, told.step_ms, told.text_ms, told.token_ms)
    writing_s, step_s, text_s, token_s = (None if each is None else each / 1e3 for each in times)
    return EdgeLoad(
        texts=told.texts,
        writing_s=writing_s,
        step_s=step_s,
        text_s=text_s,
        token_s=token_s,
        acceptance=told.acceptance,
        free=told.free,
    )


def make_pacing(settings: DeviceSettings) -> Pacing:
    """Return adaptive pacing, or fixed pacing if the draft length is fixed or nothing is drafted."""
    ahead = None if settings.ahead == AUTO else settings.ahead
    if settings.stream is True or (settings.drafter == NO_DRAFTER and settings.stream == AUTO):
        return FixedPacing(STREAMED, stream=True)
    if settings.draft_length == AUTO:
        return AdaptivePacing(ahead=ahead, stream=None if settings.stream == AUTO else False)
    return FixedPacing(settings.draft_length, ahead or False)
