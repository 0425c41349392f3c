"""Drafts in flight: what stands behind the committed text, in order, until it is decided on or void.

First the drafts that were sent, then the draft that is being built. A verdict that overtook another waits for its turn;
one whose turn has come is checked against what a correct edge may say to its draft.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from dssd.downlink import correct
from dssd.sampling import Proposal
from fleet_device.errors import ProtocolViolation, SessionFailed
from fleet_device.session.text import CommittedTokens, TokenOrigin
from schemas.downlink import DownlinkForm, Samples, UnknownForm
from schemas.logprobs import TokenLogprobs
from schemas.messages import Draft, Verdict
from schemas.policy import SamplingPolicy
from schemas.reasons import Finish


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
        return tuple(sent.draft for sent in self._sent)

    @property
    def first_under_way(self) -> bool:
        """Whether the first draft since the session was opened is in flight."""
        return any(sent.first for sent in self._sent)

    @property
    def tokens(self) -> tuple[int, ...]:
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


@dataclass(frozen=True, slots=True)
class VerdictEffect:
    """What a verdict has done.

    Attributes:
        tokens: Newly committed.
        valid: Length of the text that the drafter proposed itself and that still stands.
        correction: The token behind it that the drafter has not seen, drawn by the edge or in its name: the drafter's
            sequence is to be cut to `valid` and to go on with it. None where the drafter has nothing to learn.
        request: A further draft message to send at once: more samples are needed, or text that was lost.
        decided: The draft and its verdict.
        streamed: Whether the edge has written the tokens by itself.
        logprobs: Of `tokens`, where they were asked for.
        piece: The verdict that has brought them then.
    """

    tokens: tuple[int, ...] = ()
    valid: int = 0
    correction: int | None = None
    request: Draft | None = None
    decided: DecidedDraft | None = field(default=None, compare=False)
    streamed: bool = False
    logprobs: tuple[TokenLogprobs, ...] = ()
    piece: Verdict | None = field(default=None, compare=False)

    @property
    def committed(self) -> CommittedTokens:
        """The newly committed tokens, each with where it comes from."""
        if self.streamed or self.decided is None:
            return CommittedTokens(self.tokens, (TokenOrigin.STREAMED,) * len(self.tokens), self.logprobs)
        draft, verdict = self.decided.draft, self.decided.verdict
        drafted = 0 if draft.tried is not None else verdict.accepted
        corrects = draft.tried is not None or verdict.accepted < len(draft.tokens)
        last = TokenOrigin.CORRECTED if corrects else TokenOrigin.BONUS
        forced = [proposal.forced for proposal in self.decided.sent.proposals[:drafted]]
        heads = tuple(TokenOrigin.FORCED if each else TokenOrigin.DRAFTED for each in forced)
        origins = heads + (last,) * (len(self.tokens) - drafted)
        return CommittedTokens(self.tokens, origins, self.logprobs)


MOST_REQUESTS: Final = 32
"""Most requests of further samples at one position: each lot is up to four times as long as all before it, so that an
honest edge is hardly ever asked for a third."""


@dataclass(slots=True)
class Rejection:
    """A rejected position whose correction is not drawn yet.

    Attributes:
        proposal: What was rejected.
        position: Where.
        tried: Samples that have failed so far.
    """

    proposal: Proposal
    position: int
    tried: int = 0
    _requests: int = 0

    @property
    def device_draws(self) -> bool:
        """Whether the correction is the device's to draw, so that the edge has to be told of it."""
        return self.proposal.quantized is not None

    def ask_again(self) -> None:
        """Count a request of further samples.

        Raises:
            SessionFailed: There were too many: the samples can hardly be drawn from the distribution that rejected.
        """
        self._requests += 1
        if self._requests > MOST_REQUESTS:
            raise SessionFailed(
                f"The edge has sent {self.tried} samples in place of a rejected token, and none of them can take it; "
                "ask again with another seed, or have the edge send another downlink form."
            )

    def correction(self, following: int | DownlinkForm | UnknownForm | None, *, policy: SamplingPolicy) -> int | None:
        """Return the token that takes the rejected one's place.

        Args:
            following: What the edge sent to correct it with.
            policy: The session's.

        Returns:
            The token, which the vocabulary may not have; None if more samples are needed.

        Raises:
            ProtocolViolation: Nothing can be drawn from that.
        """
        quantized = self.proposal.quantized
        if following is None:
            raise ProtocolViolation("The edge rejected a token and sent nothing to correct it with.")
        if isinstance(following, UnknownForm):
            raise ProtocolViolation(
                f"The edge sent the target distribution in form {following.number}, which this device does not know; "
                "update the device, or have the edge use another form."
            )
        if quantized is None:
            if not isinstance(following, int):
                raise ProtocolViolation("In coupled mode a correction is a token.")
            return following
        if isinstance(following, int):
            raise ProtocolViolation("In residual mode a correction is drawn by the device.")
        if isinstance(following, Samples) and following.start != self.tried:
            # Each index is one draw: to look at some again, or to skip some, would bend the law.
            raise ProtocolViolation(
                f"The edge sent samples from {following.start} on, the device has tried {self.tried}."
            )
        token = correct(following, quantized, policy=policy, position=self.position)
        if token is None:
            assert isinstance(following, Samples)
            self.tried += len(following.ids)
        return token


_MOST_EARLY: Final = 64
"""Pieces that are kept until what is missing before them has come; each brings one token at least."""


@dataclass(slots=True)
class Streaming:
    """The latest request to write.

    Attributes:
        request: As sent.
        first_round: Of the first of the requests in a row: what answers any of them is part of the same text.
        until: Position up to which the edge was asked to write.
        first: Whether nothing has come since the session was opened, so that the edge has the prompt to compute.
        early: Pieces before which another is missing.
        missed_at: Where the text ended when it was last asked for again, because a piece was missing.
    """

    request: Draft
    first_round: int
    until: int
    first: bool = False
    early: list[Verdict] = field(default_factory=list)
    missed_at: int | None = None

    @property
    def stops(self) -> bool:
        """Whether the request was to write no more."""
        return self.request.write == 0

    def concerns(self, verdict: Verdict) -> bool:
        """Whether a verdict answers one of the requests."""
        return self.first_round <= verdict.round <= self.request.round

    def keep(self, verdict: Verdict) -> None:
        """Keep a piece before which another is missing."""
        if len(self.early) < _MOST_EARLY:
            self.early.append(verdict)

    def take_early(self, length: int) -> Verdict | None:
        """Return a piece that was kept, if a text of this length leads up to it."""
        found = next((each for each in self.early if each.base is not None and each.base <= length), None)
        if found is not None:
            self.early.remove(found)
        return found

    def news(self, verdict: Verdict, *, text: Sequence[int], end_tokens: Collection[int]) -> tuple[int, ...]:
        """Return what a piece adds to the text.

        Args:
            verdict: The piece; it begins within the text or right behind it.
            text: All that is committed.
            end_tokens: Ids that end it.

        Raises:
            ProtocolViolation: It is no continuation of the text.
        """
        base, written = verdict.base, verdict.written
        assert base is not None
        assert written is not None
        known = len(text) - base
        if list(written[:known]) != list(text[base : base + len(written)]):
            raise ProtocolViolation("The edge has sent another text than before at the same place.")
        new = written[known:]
        if any(token in end_tokens for token in new[:-1]):
            raise ProtocolViolation("The edge has written on behind an end token.")
        return new
