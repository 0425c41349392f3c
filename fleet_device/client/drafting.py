"""Drafting for a session: what is sent next, the draft model in step with the committed tokens, and grammars.

The edge decides which tokens are possible. An error in the constraint here costs speed and nothing else.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fleet_common.grammar.errors import GrammarError
from fleet_common.grammar.matcher import GrammarMatcher
from fleet_device.drafters.contract import Drafter, DraftsConstrained, restrict
from fleet_device.drafters.suffix import SuffixDrafter
from fleet_device.pacing.contract import EDGE_ONLY_TOKENS, DraftOutcome, Pacing, Plan, RoundTrips
from fleet_device.session.machine import DeviceSession
from fleet_device.session.sequence import SentDraft, VerdictEffect
from sampling.distribution import Dist, point_mass
from schemas.fields import MAX_DRAFT
from schemas.messages import Draft, Opened
from schemas.policy import SamplingPolicy


@dataclass(slots=True)
class SessionPacing:
    """Pacing of one session: request a plan before each draft and report its outcome."""

    session: DeviceSession
    pacing: Pacing
    clock: Callable[[], float]
    source: SuffixDrafter | None = None
    drafts: int = 0
    round_trips: RoundTrips = field(default_factory=RoundTrips)
    _opened: Opened | None = None  # whose load the pacing has
    _piece_at: float | None = None  # when the last piece of edge-only decoding arrived
    _repeated: set[int] = field(default_factory=set)  # rounds with suffix drafts
    _draft_ms: float = 0.0  # the session's count at the beginning of the draft
    _caught_up: bool = False  # the draft's first token includes reading what the edge has decoded
    _opening_until: float = -math.inf  # when the first verdict arrived: steps before it may have computed the prompt

    def plan(self) -> Plan:
        opened = self.session.opened
        assert opened is not None
        self.begin()
        if opened is not self._opened:
            if opened.load is not None:
                self.pacing.note_load(opened.load)
            self._opened = opened
        longest, window, source = opened.max_draft, opened.window, self.source
        plan = self.pacing.plan(longest=longest, window=window)
        if source is not None:
            prospect = source.prospect(self.session.request.policy)
            if prospect is not None:
                plan = self.pacing.weigh(plan, prospect, longest=longest, window=window)
            source.begin_draft(repeats=plan.repeats, least=plan.least)
        return plan

    def goes_on(self, plan: Plan) -> bool:
        chances = self.session.chances
        return not plan.may_stop or not chances or self.pacing.goes_on(chances)

    def begin(self) -> None:
        """Begin a draft; discard the one in progress."""
        self._draft_ms, self._caught_up = self.session.counters.draft_ms, False
        if self.source is not None:
            self.source.caught_up_s()

    def note_catch_up(self) -> None:
        """Leave the draft's first token out of the time of drafting: it includes reading what the edge has decoded."""
        self._draft_ms, self._caught_up = self.session.counters.draft_ms, True

    def finish_draft(self, *, ahead: bool) -> Draft:
        """Send the draft in progress; with `ahead`, announce another before the verdict, if there is room."""
        self.drafts += 1
        draft_s = (self.session.counters.draft_ms - self._draft_ms) / 1e3
        if self.source is not None:
            # Reading tokens that the draft model has not drafted does not count as drafting time.
            draft_s = max(0.0, draft_s - self.source.caught_up_s())
        if self._caught_up:
            others = len(self.session.chances) - 1
            draft_s *= (others + 1) / others if others > 0 else math.nan  # unknown
        draft = self.session.finish_draft(more=ahead and self.session.may_draft_ahead, at=self.clock(), draft_s=draft_s)
        if self.source is not None and self.source.repeats:
            self._repeated.add(draft.round)
            self.session.counters.suffix_drafted += len(draft.tokens)
        return draft

    def learn(self, effects: Iterable[VerdictEffect]) -> None:
        """Record verdicts, in the order of the drafts; a verdict on an empty draft teaches nothing."""
        for effect in effects:
            decided = effect.decided
            if decided is not None and decided.verdict.load is not None:
                self.pacing.note_load(decided.verdict.load)
            if effect.edge_only:
                self._learn_edge_only(effect)
            elif decided is not None and decided.draft.tried is None:
                self._learn(decided)

    def request_edge_only(self, tokens: int) -> Draft:
        """Request edge-only decoding of a number of tokens; 0 stops it."""
        if not self.session.edge_only:
            self._piece_at = None
        return self.session.request_edge_only(tokens)

    def _learn_edge_only(self, effect: VerdictEffect) -> None:
        if not effect.tokens:
            return
        now, before = self.clock(), self._piece_at
        # The time of the first piece includes the request; so does the next one after a repeated request.
        if before is not None:
            step_s = 0.0 if effect.decided is None else effect.decided.verdict.compute_ms / 1e3
            self.pacing.learn_edge_only(len(effect.tokens), now - before, step_s=step_s)
        self._piece_at = now if self.session.edge_only else None

    def _learn(self, sent: SentDraft) -> None:
        verdict = sent.verdict
        tokens = len(sent.draft.tokens)
        if verdict.accepted < tokens:
            self.begin()
        repeated = sent.draft.round in self._repeated
        if repeated:
            self._repeated.discard(sent.draft.round)
            self.session.counters.suffix_tested += min(tokens, verdict.accepted + 1)
            self.session.counters.suffix_accepted += verdict.accepted
        answer_s = self.clock() - sent.at
        if sent.first:
            self._opening_until = self.clock()
        self.round_trips.add(answer_s * 1e3)
        self.pacing.learn(
            DraftOutcome(
                tokens=tokens,
                ahead=sent.draft.more,
                accepted=verdict.accepted,
                token_s=sent.draft_s / tokens if tokens else 0.0,
                answer_s=answer_s,
                compute_s=verdict.compute_ms / 1e3,
                opening=sent.first or sent.at < self._opening_until,
                chances=tuple(proposal.chance for proposal in sent.proposals),
                queue_s=verdict.queue_ms / 1e3,
                chained=verdict.chained or 0,
                repeats=repeated and self.source is not None and self.source.model is not None,
            )
        )


@dataclass(slots=True)
class Drafting:
    """The next message of a session: the draft being built, or a request for edge-only decoding."""

    session: DeviceSession
    drafts: "DraftSequence"
    pacing: SessionPacing
    _plan: Plan | None = None  # of the draft being built
    _requested: int = 0  # tokens that the edge was last asked to decode
    _behind: bool = False  # the drafter has not seen what the edge has decoded

    def step(self) -> Draft | None:
        """Draft a token; return what to send if there is nothing more to draft."""
        if self._plan is None:
            self._plan = self._next_plan()
        if self._plan.edge_only and self.session.unanswered():
            self._plan = Plan(0)  # the draft that the last one announced; edge-only decoding starts after its verdict
        if self._plan.edge_only:
            self._requested, self._plan = self._plan.tokens, None
            return self.pacing.request_edge_only(self._requested)
        first = self._behind
        if self._behind:
            self._behind = False
            self.drafts.rewind()
        # Tokens that a grammar forces are drafted even where the pacing wants no more.
        if self.drafts.draft(self._plan.tokens if self.pacing.goes_on(self._plan) else 0):
            if first:
                self.pacing.note_catch_up()
            return None
        draft = self.pacing.finish_draft(ahead=self._plan.ahead)
        self._plan = None
        return draft

    def follow(self, effect: VerdictEffect) -> None:
        if effect.edge_only:
            self._behind = True
        else:
            self.drafts.follow(effect)

    def renewal(self) -> Draft | None:
        """Return the request that the edge decodes on, or stops, well before it reaches its limit."""
        if self.session.edge_only_left * 2 > self._requested:
            return None
        plan = self._next_plan()
        self._requested = plan.tokens if plan.edge_only else 0
        return self.pacing.request_edge_only(self._requested)

    def drop(self) -> None:
        self._plan = None

    def restart(self) -> None:
        """Begin again behind the committed tokens."""
        self._plan, self._behind = None, False
        self.drafts.rewind()

    def _next_plan(self) -> Plan:
        if self.drafts.is_outgrown:
            return Plan(EDGE_ONLY_TOKENS, edge_only=True)
        self._catch_up()
        return self.pacing.plan()

    def _catch_up(self) -> None:
        """Show a suffix drafter what the edge has decoded, since its matches decide on the plan."""
        if self._behind and self.drafts.source is not None:
            self._behind = False
            self.drafts.rewind()


@dataclass(frozen=True, slots=True)
class DraftSequence:
    """The draft model in step with a session: ahead of the committed tokens, and back where a draft was rejected.

    Every method raises DrafterError if the draft model failed or does not know a token.
    """

    session: DeviceSession
    drafter: Drafter
    clock: Callable[[], float]
    constraint: "DraftConstraint | None" = None

    def rewind(self) -> None:
        self.drafter.reset((*self.session.request.prompt, *self.session.committed))
        self._observe()

    def follow(self, effect: VerdictEffect) -> None:
        """Bring the drafter to where a verdict has led, unless the generation has ended."""
        if effect.correction is not None and self.session.ended is None:
            self.drafter.truncate(len(self.session.request.prompt) + effect.valid)
            self.drafter.extend((effect.correction,))
        if effect.tokens:
            self._observe()

    @property
    def source(self) -> SuffixDrafter | None:
        """The suffix drafter, if that is what drafts."""
        return self.drafter if isinstance(self.drafter, SuffixDrafter) else None

    @property
    def is_outgrown(self) -> bool:
        """The request is longer than the draft model's context."""
        return len(self.session.request.prompt) + self.session.position >= self.drafter.context

    def draft(self, limit: int) -> bool:
        """Draft one token; return False if the draft is long enough, the context full, or there is no proposal.

        Tokens that a grammar forces do not count towards `limit`: they cost no time.
        """
        session, drafter, constraint = self.session, self.drafter, self.constraint
        if constraint is not None and self._draft_forced(constraint):
            return True
        most = limit if constraint is None else limit + session.forced
        if not session.room(most) or self.is_outgrown:
            return False
        started = self.clock()
        policy = self._policy_after(session.ahead)
        q = drafter.next(policy) if constraint is None else constraint.next(drafter, policy, text=session.ahead)
        if q is None:
            return False
        drafter.extend((session.propose(q),))
        session.counters.draft_ms += (self.clock() - started) * 1e3
        return True

    def generate_alone(self) -> int | None:
        """Generate the next token without an edge; return None if the drafter has no proposal."""
        session, drafter, constraint = self.session, self.drafter, self.constraint
        started = self.clock()
        q = drafter.next(self._policy_after(session.committed)) if constraint is None else self._next_alone(constraint)
        if q is None:
            return None
        token = session.generate_alone(q)
        if session.ended is None:
            drafter.extend((token,))
        session.counters.draft_ms += (self.clock() - started) * 1e3
        return token

    def _next_alone(self, constraint: "DraftConstraint") -> Dist | None:
        text = self.session.committed
        if (token := constraint.forced(text)) is not None:
            return point_mass(token)
        return constraint.next(self.drafter, self._policy_after(text), text=text)

    def _policy_after(self, text: Sequence[int]) -> SamplingPolicy:
        request = self.session.request
        return request.policy.after(request.prompt, text, self.session.sequence.end_tokens or ())

    def _observe(self) -> None:
        if (source := self.source) is not None:
            source.observe(len(self.session.request.prompt) + len(self.session.committed))

    def _draft_forced(self, constraint: "DraftConstraint") -> bool:
        """Draft the token that must come next, if that is certain and the draft has room."""
        session, drafter = self.session, self.drafter
        if not session.room(MAX_DRAFT) or self.is_outgrown:
            return False
        started = self.clock()
        token = constraint.forced(session.ahead)
        if token is not None:
            session.propose_forced(token)
            drafter.extend((token,))  # computed with what follows, if the draft model is asked for more
        session.counters.draft_ms += (self.clock() - started) * 1e3
        return token is not None


@dataclass(slots=True)
class DraftConstraint:
    """A grammar, followed along the committed and drafted tokens."""

    matcher: GrammarMatcher

    def forced(self, text: Sequence[int]) -> int | None:
        """Return the token that must follow; None if there is a choice, or that is not known."""
        try:
            return next(iter(self.matcher.forced(text)), None)
        except GrammarError:
            return None

    def next(self, drafter: Drafter, policy: SamplingPolicy, *, text: Sequence[int]) -> Dist | None:
        """Return the draft model's distribution restricted to the grammar; None for no proposal.

        `text` has the committed and drafted tokens, without the prompt; the drafter's sequence ends with it.
        """
        try:
            allowed = self.matcher.allowed(text)
        except GrammarError:
            return drafter.next(policy)
        if isinstance(drafter, DraftsConstrained):
            return drafter.next_allowed(policy, allowed)
        dist = drafter.next(policy)
        return None if dist is None else restrict(dist, allowed)
