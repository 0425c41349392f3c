"""Drafting for a session: what is sent next, the draft model in step with the committed tokens, and grammars.

The edge decides which tokens are possible. An error in the constraint here costs speed and nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dssd.distribution import Dist, Ids, point_mass
from fleet_common.grammar.errors import GrammarError
from fleet_common.grammar.matcher import GrammarMatcher
from fleet_device.drafters.contract import Drafter, DraftsConstrained
from fleet_device.drafters.suffix.drafter import SuffixDrafter
from fleet_device.pacing.contract import Plan
from fleet_device.pacing.session_pacing import SessionPacing
from fleet_device.session.in_flight import VerdictEffect
from fleet_device.session.machine import DeviceSession
from fleet_device.session.text import CommittedTokens, TokenOrigin
from schemas.bounds import MAX_DRAFT
from schemas.messages import Draft
from schemas.policy import SamplingPolicy


@dataclass(slots=True)
class Drafting:
    """What a session sends next: the draft being built, or a request for edge-only decoding.

    Attributes:
        drafts: The draft model, in step with the session.
        pacing: How much to draft.
    """

    session: DeviceSession
    drafts: "DraftSequence"
    pacing: SessionPacing
    _plan: Plan | None = None  # of the draft being built
    _asked: int = 0  # tokens that the edge was last asked to decode
    _behind: bool = False  # the drafter has not seen what the edge has decoded

    def step(self) -> Draft | None:
        """Draft a token; return what to send if there is nothing more to draft."""
        if self._plan is None:
            self._catch_up()
            self._plan = self.pacing.plan()
        if self._plan.stream and self.session.unanswered():
            self._plan = Plan(0)  # the draft that the last one announced; edge-only decoding starts after its verdict
        if self._plan.stream:
            self._asked, self._plan = self._plan.tokens, None
            return self.pacing.stream(self._asked)
        if self._behind:
            self._behind = False
            self.drafts.rewind()
        # Tokens that a grammar forces are drafted even where the pacing wants no more.
        if self.drafts.draft(self._plan.tokens if self.pacing.goes_on(self._plan) else 0):
            return None
        draft = self.pacing.send(ahead=self._plan.ahead)
        self._plan = None
        return draft

    def follow(self, effect: VerdictEffect) -> None:
        """Follow what a verdict has committed."""
        if effect.streamed:
            self._behind = True
        else:
            self.drafts.follow(effect)

    def renewal(self) -> Draft | None:
        """Return the request that the edge decodes on, or stops, well before it reaches its limit."""
        if self.session.stream_left * 2 > self._asked:
            return None
        self._catch_up()
        plan = self.pacing.plan()
        self._asked = plan.tokens if plan.stream else 0
        return self.pacing.stream(self._asked)

    def drop(self) -> None:
        self._plan = None

    def restart(self) -> None:
        """Begin again behind the committed tokens."""
        self._plan, self._behind = None, False
        self.drafts.rewind()

    def _catch_up(self) -> None:
        """Show a suffix drafter what the edge has decoded, since its matches decide on the plan."""
        if self._behind and self.drafts.source is not None:
            self._behind = False
            self.drafts.rewind()


@dataclass(frozen=True, slots=True)
class DraftSequence:
    """The draft model in step with a session: ahead of the committed tokens, and back where a draft was rejected.

    Raises:
        DrafterError: By every method: the draft model failed, or was given a token that it does not know.
    """

    session: DeviceSession
    drafter: Drafter
    clock: Callable[[], float]
    constraint: "DraftConstraint | None" = None

    def rewind(self) -> None:
        """Bring the drafter to the end of the committed tokens."""
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

    def committed(self, effect: VerdictEffect, *, begin: int) -> CommittedTokens:
        """Return what a verdict has committed behind the first `begin` tokens, each token with its origin."""
        if self.constraint is None:
            return effect.committed
        return self.constraint.origins(self.session.committed, effect.committed, begin=begin)

    def draft(self, limit: int) -> bool:
        """Draft one token.

        Args:
            limit: Most tokens of the draft. Those that a grammar forces do not count: they cost no time.

        Returns:
            False if there is none: the draft is long enough, the context is full, or the drafter has no proposal.
        """
        session, drafter, constraint = self.session, self.drafter, self.constraint
        if constraint is not None and self._draft_forced(constraint):
            return True
        most = limit if constraint is None else limit + session.forced
        if not session.room(most) or len(session.request.prompt) + session.position >= drafter.context:
            return False
        started = self.clock()
        policy = session.request.policy
        q = drafter.next(policy) if constraint is None else constraint.next(drafter, policy, text=session.ahead)
        if q is None:
            return False
        drafter.extend((session.propose(q),))
        session.counters.draft_ms += (self.clock() - started) * 1e3
        return True

    def write_alone(self) -> int | None:
        """Generate the next token without an edge; return None if the drafter has no proposal."""
        session, drafter, constraint = self.session, self.drafter, self.constraint
        started = self.clock()
        q = drafter.next(session.request.policy) if constraint is None else self._next_alone(constraint)
        if q is None:
            return None
        token = session.write_alone(q)
        if session.ended is None:
            drafter.extend((token,))
        session.counters.draft_ms += (self.clock() - started) * 1e3
        return token

    def _next_alone(self, constraint: "DraftConstraint") -> Dist | None:
        text = self.session.committed
        if (token := constraint.forced(text)) is not None:
            return point_mass(token)
        return constraint.next(self.drafter, self.session.request.policy, text=text)

    def _observe(self) -> None:
        """Let a suffix drafter learn from the committed tokens."""
        if (source := self.source) is not None:
            source.observe(len(self.session.request.prompt) + len(self.session.committed))

    def _draft_forced(self, constraint: "DraftConstraint") -> bool:
        """Draft the token that must come next, if that is certain and the draft has room."""
        session, drafter = self.session, self.drafter
        if not session.room(MAX_DRAFT) or len(session.request.prompt) + session.position >= drafter.context:
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

        Args:
            drafter: Its sequence ends with `text`.
            policy: The session's.
            text: Committed and drafted tokens, without the prompt.
        """
        try:
            allowed = self.matcher.allowed(text)
        except GrammarError:
            return drafter.next(policy)
        if isinstance(drafter, DraftsConstrained):
            return drafter.next_allowed(policy, allowed)
        dist = drafter.next(policy)
        return None if dist is None else restrict(dist, allowed)

    def origins(self, text: Sequence[int], committed: CommittedTokens, *, begin: int) -> CommittedTokens:
        """Return the part of the committed tokens that begins at `begin`, with the forced ones marked."""
        origins = list(committed.origins)
        place = 0
        while place < len(origins):
            try:
                run = self.matcher.forced(text[: begin + place])
            except GrammarError:
                break
            for offset, token in enumerate(run[: len(origins) - place]):
                if token == committed.ids[place + offset]:
                    origins[place + offset] = TokenOrigin.FORCED
            place += max(1, len(run))
        return replace(committed, origins=tuple(origins))


def restrict(dist: Dist, allowed: Ids) -> Dist | None:
    """Return a distribution restricted to some ids (int64, rising), or None if it has none of them."""
    kept = np.isin(dist.ids, allowed)
    if not kept.any():
        return None
    probs = dist.probs[kept]
    return Dist(dist.ids[kept], probs / probs.sum())
