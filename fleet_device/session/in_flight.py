"""Drafts in flight: what stands behind the committed text, in order, until it is decided on or void.

First the drafts that were sent, then the draft that is being built. A verdict that overtook another waits for its turn;
one whose turn has come is checked against what a correct edge may say to its draft.
"""

from collections import deque
from dataclasses import dataclass, field

from dssd.sampling import Proposal
from fleet_device.errors import ProtocolViolation
from schemas.logprobs import TokenLogprobs
from schemas.messages import Draft, Verdict
from schemas.reasons import Finish

__all__ = ["DecidedDraft", "DraftsInFlight", "SentDraft"]


@dataclass(frozen=True, slots=True)
class SentDraft:
    """A draft in flight.

    Attributes:
        draft: As sent.
        proposals: How its tokens were drawn.
        at: When it was sent, on the clock of whoever sent it (seconds).
        draft_s: Time that the draft model took for its tokens (seconds).
        first: Whether it is the first since the session was opened, so that its times hold the prompt's as well.
    """

    draft: Draft
    proposals: tuple[Proposal, ...] = ()
    at: float = 0.0
    draft_s: float = 0.0
    first: bool = False


@dataclass(frozen=True, slots=True)
class DecidedDraft:
    """A draft and its verdict, held against what a correct edge may say.

    Attributes:
        verdict: The edge's.
        sent: The draft that it decides on.
    """

    verdict: Verdict
    sent: SentDraft

    @property
    def draft(self) -> Draft:
        """The draft as sent."""
        return self.sent.draft

    def head(self) -> tuple[int, ...]:
        """Return the accepted head of the draft.

        Raises:
            ProtocolViolation: More was accepted than drafted.
        """
        accepted, drafted = self.verdict.accepted, self.draft.tokens
        if accepted > len(drafted):
            raise ProtocolViolation(f"The edge accepted {accepted} of {len(drafted)} tokens.")
        return drafted[:accepted]

    def rejected(self) -> Proposal | None:
        """Return the proposal that was rejected, or None if the whole draft stands."""
        accepted = self.verdict.accepted
        return self.sent.proposals[accepted] if accepted < len(self.draft.tokens) else None

    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Return what the edge has told of log-probabilities: of the head, and of what follows it."""
        return () if self.verdict.logprobs is None else self.verdict.logprobs.tokens()

    def bonus(self) -> tuple[int, ...]:
        """Return the token that the edge drew after a draft that stands: one, or none if the next draft begins there.

        Raises:
            ProtocolViolation: One is due and missing, or there is something else.
        """
        following = self.verdict.next
        if isinstance(following, int):
            if self.draft.more:
                raise ProtocolViolation("The edge drew a token that the next draft already stands on.")
            return (following,)
        if following is not None:
            raise ProtocolViolation("The edge sent a distribution although nothing was rejected.")
        if self.verdict.finish is Finish.NO and not self.draft.more:
            raise ProtocolViolation("The edge accepted a draft and drew no token after it.")
        return ()


@dataclass(slots=True)
class DraftsInFlight:
    """Drafts in the order in which they will be decided on.

    Attributes:
        building: The proposals of the next draft.
    """

    building: list[Proposal] = field(default_factory=list)
    _sent: deque[SentDraft] = field(default_factory=deque)
    _early: dict[int, Verdict] = field(default_factory=dict)

    @property
    def drafts(self) -> tuple[Draft, ...]:
        """The drafts in flight."""
        return tuple(sent.draft for sent in self._sent)

    @property
    def first_under_way(self) -> bool:
        """Whether the first draft since the session was opened is in flight."""
        return any(sent.first for sent in self._sent)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens in flight."""
        return tuple(token for sent in self._sent for token in sent.draft.tokens)

    @property
    def length(self) -> int:
        """Tokens in flight or being built."""
        return sum(len(sent.draft.tokens) for sent in self._sent) + len(self.building)

    @property
    def last_token(self) -> int | None:
        """The last token in flight or being built, if there is one."""
        if self.building:
            return self.building[-1].token
        return next((sent.draft.tokens[-1] for sent in reversed(self._sent) if sent.draft.tokens), None)

    def sent(self, draft: Draft, *, at: float = 0.0, draft_s: float = 0.0, first: bool = False) -> None:
        """Take a draft that was made of what was built; the next one is empty. See `SentDraft` for the arguments."""
        self._sent.append(SentDraft(draft, tuple(self.building), at, draft_s, first))
        self.building.clear()

    def heard(self, verdict: Verdict) -> None:
        """Keep a verdict for its turn, unless it is a repeat or decides on what is void."""
        if any(verdict.round == sent.draft.round for sent in self._sent):
            self._early[verdict.round] = verdict

    def next_decided(self) -> DecidedDraft | None:
        """Take the oldest draft out if its verdict is there."""
        if not self._sent or self._sent[0].draft.round not in self._early:
            return None
        sent = self._sent.popleft()
        return DecidedDraft(self._early.pop(sent.draft.round), sent)

    def void(self) -> None:
        """Forget all: it stands on a text that is not to be."""
        self._sent.clear()
        self.building.clear()
        self._early.clear()
