"""Draft sequence: keeps the draft model in step with a session, ahead of the text, and back where it went astray."""

from collections.abc import Callable
from dataclasses import dataclass

from dssd.distribution import Dist, point_mass
from fleet_device.client.constraint import DraftConstraint
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.suffix.drafter import SuffixDrafter
from fleet_device.pacing.contract import Plan
from fleet_device.pacing.session_pacing import SessionPacing
from fleet_device.session.in_flight import VerdictEffect
from fleet_device.session.machine import DeviceSession
from fleet_device.session.text import CommittedTokens
from schemas.bounds import MAX_DRAFT
from schemas.messages import Draft


@dataclass(frozen=True, slots=True)
class DraftSequence:
    """A drafter at work for a session.

    Raises:
        DrafterError: By every method: the draft model failed, or was given a token that it does not know.

    Attributes:
        session: Whose text it drafts for; counts the time that the draft model takes.
        drafter: The draft model.
        clock: Monotonic seconds.
        constraint: The text's grammar, if it has one.
    """

    session: DeviceSession
    drafter: Drafter
    clock: Callable[[], float]
    constraint: DraftConstraint | None = None

    def rewind(self) -> None:
        """Bring the drafter to the end of the committed text."""
        self.drafter.reset((*self.session.request.prompt, *self.session.committed))
        self._observe()

    def follow(self, effect: VerdictEffect) -> None:
        """Bring the drafter to where a verdict has led the text, unless it has led it to its end."""
        if effect.correction is not None and self.session.ended is None:
            self.drafter.truncate(len(self.session.request.prompt) + effect.valid)
            self.drafter.extend((effect.correction,))
        if effect.tokens:
            self._observe()

    @property
    def source(self) -> SuffixDrafter | None:
        """What drafts from earlier text, if the drafter does."""
        return self.drafter if isinstance(self.drafter, SuffixDrafter) else None

    def committed(self, effect: VerdictEffect, *, begin: int) -> CommittedTokens:
        """Return what a verdict has committed, each token with where it comes from.

        Args:
            effect: Of the verdict.
            begin: Length of the text before it.
        """
        if self.constraint is None:
            return effect.committed
        return self.constraint.origins(self.session.committed, effect.committed, begin=begin)

    def draft(self, limit: int) -> bool:
        """Draft one token.

        Args:
            limit: Tokens that the draft may have, those not counted that a grammar forces: they cost no time.

        Returns:
            False if none is to be drafted, so that the target writes the next one alone: the draft is long enough, the
            draft model's context ends here, or the drafter has no idea.
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
        """Write the next token of the text without an edge.

        Returns:
            Its id; None if the drafter has no idea, and nothing was written.
        """
        session, drafter, constraint = self.session, self.drafter, self.constraint
        started = self.clock()
        q = drafter.next(session.request.policy) if constraint is None else self._alone(constraint)
        if q is None:
            return None
        token = session.write_alone(q)
        if session.ended is None:
            drafter.extend((token,))
        session.counters.draft_ms += (self.clock() - started) * 1e3
        return token

    def _alone(self, constraint: DraftConstraint) -> Dist | None:
        """Return the draft model's distribution of the next token given the grammar; it is not asked where one must."""
        text = self.session.committed
        token = constraint.forced(text)
        return (
            constraint.next(self.drafter, self.session.request.policy, text=text)
            if token is None
            else point_mass(token)
        )

    def _observe(self) -> None:
        """Let what drafts from earlier text learn from what is committed."""
        if (source := self.source) is not None:
            source.observe(len(self.session.request.prompt) + len(self.session.committed))

    def _draft_forced(self, constraint: DraftConstraint) -> bool:
        """Draft the token that must come next, if that is certain and the edge takes a draft so long."""
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
class Drafting:
    """What a session sends next: the draft being built, or a request that the edge decodes on its own.

    Attributes:
        session: The state machine.
        drafts: The draft model, in step with it.
        pacing: How much to draft.
    """

    session: DeviceSession
    drafts: DraftSequence
    pacing: SessionPacing
    _plan: Plan | None = None  # of the draft being built
    _asked: int = 0  # tokens that the edge was last asked to decode
    _behind: bool = False  # the drafter has not seen what the edge has decoded

    def step(self) -> Draft | None:
        """Draft a token; return what to send if there is nothing more to draft."""
        if self._plan is None:
            self._look_back()
            self._plan = self.pacing.plan()
        if self._plan.stream and self.session.unanswered():
            self._plan = Plan(0)  # the draft that the last one has announced; the edge decodes once it is decided on
        if self._plan.stream:
            self._asked, self._plan = self._plan.tokens, None
            return self.pacing.stream(self._asked)
        if self._behind:
            self._behind = False
            self.drafts.rewind()
        # What a grammar forces is drafted all the same where the pacing wants no more.
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
        """Return the request that the edge decodes on, or stops, well before it has decoded what it was asked for."""
        if self.session.stream_left * 2 > self._asked:
            return None
        self._look_back()
        plan = self.pacing.plan()
        self._asked = plan.tokens if plan.stream else 0
        return self.pacing.stream(self._asked)

    def drop(self) -> None:
        self._plan = None

    def restart(self) -> None:
        """Begin again behind the committed text."""
        self._plan, self._behind = None, False
        self.drafts.rewind()

    def _look_back(self) -> None:
        """Show the drafter what the edge has decoded, where what it finds in that decides on the plan."""
        if self._behind and self.drafts.source is not None:
            self._behind = False
            self.drafts.rewind()
