"""Tokens of a session: what is asked for, what is committed, and the drafts in flight behind it.

The drafts that were sent and the draft that is being built follow the committed tokens. A verdict that
overtook another waits for its turn; then it is checked against what a correct edge may answer to its draft.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from fleet_device.errors import ProtocolViolation, SessionFailed, SessionRefused
from sampling.downlink import correct
from sampling.drawing import Proposal
from schemas.downlink import DownlinkForm, Samples, UnknownForm
from schemas.fields import MAX_LABEL, MAX_TOKENS, TokenLogprobs
from schemas.messages import Draft, Open, Verdict
from schemas.policy import SamplingPolicy
from schemas.reasons import EndReason, Finish, RefusalCode
from schemas.vocabulary import EMPTY_DIGEST, Vocabulary, extend_digest


def session_request(
    session: bytes,
    prompt: Sequence[int],
    policy: SamplingPolicy,
    max_new_tokens: int,
    vocabulary: Vocabulary,
    draft_model: str,
    quantization: str,
    logprobs: int | None = None,
    app: str | None = None,
    *,
    echo: bool = False,
    target_id: bytes | None = None,
) -> Open:
    """Return the first Open of a session; raise SessionRefused if no Open could carry the arguments."""
    if len(prompt) > MAX_TOKENS:
        raise SessionRefused(
            RefusalCode.PROMPT_TOO_LONG,
            f"The prompt has {len(prompt)} tokens; no edge takes more than {MAX_TOKENS}. Shorten it.",
        )
    if not 0 <= max_new_tokens <= MAX_TOKENS:
        raise SessionRefused(
            RefusalCode.MAX_NEW_TOKENS, f"max_new_tokens is {max_new_tokens}; ask for 1 to {MAX_TOKENS} tokens."
        )
    return Open(
        session=session,
        vocabulary=vocabulary,
        draft_model=draft_model[:MAX_LABEL],
        quantization=quantization[:MAX_LABEL],
        policy=policy,
        prompt=tuple(prompt),
        max_new_tokens=max_new_tokens,
        logprobs=logprobs,
        app=app,
        echo=echo or None,
        target_id=target_id,
    )


class TokenOrigin(StrEnum):
    """How a token was committed. All but the last two follow the large model's distribution.

    Attributes:
        DRAFTED: The draft model proposed it, and the edge accepted it.
        CORRECTED: It replaced a draft token that the edge rejected.
        BONUS: The edge drew it after a draft that it accepted whole.
        EDGE_ONLY: Edge-only decoding.
        FORCED: The device proposed it because a grammar allowed no other.
        OTHER_TARGET: Another target model than the request began with verified it, or it follows such a token.
        UNVERIFIED: The draft model generated it without an edge.
    """

    DRAFTED = "drafted"
    CORRECTED = "corrected"
    BONUS = "bonus"
    EDGE_ONLY = "edge-only"
    FORCED = "forced"
    OTHER_TARGET = "other-target"
    UNVERIFIED = "unverified"

    @property
    def verified(self) -> bool:
        return self not in (TokenOrigin.OTHER_TARGET, TokenOrigin.UNVERIFIED)


@dataclass(frozen=True, slots=True)
class CommittedTokens(Sequence[int]):
    """Newly committed tokens.

    Attributes:
        target_id: Identity of the target model that the request began with, if an edge has granted it.
        end: Why the generation ends with them; None if it goes on.
    """

    ids: tuple[int, ...]
    origins: tuple[TokenOrigin, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    target_id: bytes | None = field(default=None, compare=False)
    end: EndReason | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.origins):
            raise ValueError(f"{len(self.ids)} tokens have {len(self.origins)} origins")

    def first(self, count: int) -> "CommittedTokens":
        if count == len(self):
            return self
        return replace(
            self, ids=self.ids[:count], origins=self.origins[:count], logprobs=self.logprobs[:count], end=None
        )

    def of_other_target(self) -> "CommittedTokens":
        return replace(self, origins=(TokenOrigin.OTHER_TARGET,) * len(self.ids))

    def __getitem__(self, place: Any) -> Any:  # noqa: ANN401 - as of a tuple
        return self.ids[place]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(slots=True)
class TokenSequence:
    """The committed tokens of a session.

    `most` and `end_tokens` are its limits, as its last edge has named them; the latter is None before that.
    `verified` is the number of tokens that follow the distribution of the target model that the request began with,
    None while all do.
    """

    vocabulary: int
    most: int
    end_tokens: Collection[int] | None = None
    tokens: list[int] = field(default_factory=list)
    digest: int = EMPTY_DIGEST
    verified: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def unverified(self) -> int:
        return 0 if self.verified is None else len(self.tokens) - self.verified

    def commit(self, tokens: Sequence[int]) -> None:
        """Add tokens of an edge, or raise ProtocolViolation if no correct edge may have sent them."""
        if any(token >= self.vocabulary for token in tokens):
            raise ProtocolViolation("The edge sent a token outside the vocabulary.")
        if len(self.tokens) + len(tokens) > self.most:
            raise ProtocolViolation(f"The edge has sent more than the {self.most} tokens that it has granted.")
        self.tokens.extend(tokens)
        self.digest = extend_digest(self.digest, tokens)

    def commit_unverified(self, token: int) -> None:
        self.leave_target()
        self.commit((token,))

    def leave_target(self) -> None:
        """Record that later tokens do not follow the target distribution."""
        if self.verified is None:
            self.verified = len(self.tokens)

    def go_on_alone(self, end_tokens: Collection[int]) -> None:
        """Use the draft model's own end tokens, if no edge has named any."""
        if self.end_tokens is None:
            self.end_tokens = end_tokens

    def end(self, finish: Finish) -> EndReason | None:
        """Return the reason for the end, or None: the edge's, an end token, or the length."""
        if finish is Finish.STOP or (self.tokens and self.tokens[-1] in (self.end_tokens or ())):
            return EndReason.STOP
        return EndReason.LENGTH if finish is Finish.LENGTH or len(self.tokens) >= self.most else None


@dataclass(frozen=True, slots=True)
class SentDraft:
    """A draft that was sent, with its verdict once that has arrived; checked against what a correct edge may answer.

    `at` is the driver's clock, `draft_s` the draft model's time, in seconds. `first` marks the first draft since the
    session was opened, whose times include the prompt.
    """

    draft: Draft
    proposals: tuple[Proposal, ...] = ()
    at: float = 0.0
    draft_s: float = 0.0
    first: bool = False
    answer: Verdict | None = None

    @property
    def verdict(self) -> Verdict:
        assert self.answer is not None
        return self.answer

    def head(self) -> tuple[int, ...]:
        """Return the accepted tokens; raise ProtocolViolation if more were accepted than drafted."""
        accepted, drafted = self.verdict.accepted, self.draft.tokens
        if accepted > len(drafted):
            raise ProtocolViolation(f"The edge accepted {accepted} of {len(drafted)} tokens.")
        return drafted[:accepted]

    def rejected(self) -> Proposal | None:
        """Return the rejected proposal, or None if the whole draft was accepted."""
        accepted = self.verdict.accepted
        return self.proposals[accepted] if accepted < len(self.draft.tokens) else None

    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        return () if self.verdict.logprobs is None else self.verdict.logprobs.tokens()

    def bonus(self) -> tuple[int, ...]:
        """Return the token that the edge drew after a draft that was accepted whole; none if a draft follows."""
        following = self.verdict.next
        if isinstance(following, int):
            if self.draft.more:
                raise ProtocolViolation("The edge drew a token that the next draft already replaces.")
            return (following,)
        if following is not None:
            raise ProtocolViolation("The edge sent a distribution although nothing was rejected.")
        if self.verdict.finish is Finish.NO and not self.draft.more:
            raise ProtocolViolation("The edge accepted a draft and drew no token after it.")
        return ()


@dataclass(slots=True)
class DraftsInFlight:
    building: list[Proposal] = field(default_factory=list)
    _sent: deque[SentDraft] = field(default_factory=deque)
    _early: dict[int, Verdict] = field(default_factory=dict)

    @property
    def drafts(self) -> tuple[Draft, ...]:
        return tuple(sent.draft for sent in self._sent)

    @property
    def first_under_way(self) -> bool:
        return any(sent.first for sent in self._sent)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for sent in self._sent for token in sent.draft.tokens)

    @property
    def length(self) -> int:
        return sum(len(sent.draft.tokens) for sent in self._sent) + len(self.building)

    @property
    def last_token(self) -> int | None:
        if self.building:
            return self.building[-1].token
        return next((sent.draft.tokens[-1] for sent in reversed(self._sent) if sent.draft.tokens), None)

    def add(self, draft: Draft, *, at: float = 0.0, draft_s: float = 0.0, first: bool = False) -> None:
        """Add a draft made of the proposals in `building`."""
        self._sent.append(SentDraft(draft, tuple(self.building), at, draft_s, first))
        self.building.clear()

    def keep_verdict(self, verdict: Verdict) -> None:
        """Keep a verdict for its turn, unless it is a repeat or its draft is void."""
        if any(verdict.round == sent.draft.round for sent in self._sent):
            self._early[verdict.round] = verdict

    def next_decided(self) -> SentDraft | None:
        """Remove the oldest draft if its verdict has arrived."""
        if not self._sent or self._sent[0].draft.round not in self._early:
            return None
        sent = self._sent.popleft()
        return replace(sent, answer=self._early.pop(sent.draft.round))

    def void(self) -> None:
        self._sent.clear()
        self.building.clear()
        self._early.clear()


@dataclass(frozen=True, slots=True)
class VerdictEffect:
    """What a verdict has changed.

    Attributes:
        tokens: Newly committed.
        valid: Number of committed tokens that the drafter has in its sequence.
        correction: The token behind them that the drafter has not seen: it is to truncate its sequence to `valid` and
            append this one. None if there is nothing to do.
        request: A message to send at once, for more samples or for tokens that were lost.
        decided: What was answered, if anything: a draft, or the request for edge-only decoding.
    """

    tokens: tuple[int, ...] = ()
    valid: int = 0
    correction: int | None = None
    request: Draft | None = None
    decided: SentDraft | None = field(default=None, compare=False)
    edge_only: bool = False
    logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def committed(self) -> CommittedTokens:
        if self.edge_only or self.decided is None:
            return CommittedTokens(self.tokens, (TokenOrigin.EDGE_ONLY,) * len(self.tokens), self.logprobs)
        draft, verdict = self.decided.draft, self.decided.verdict
        drafted = 0 if draft.tried is not None else verdict.accepted
        corrects = draft.tried is not None or verdict.accepted < len(draft.tokens)
        last = TokenOrigin.CORRECTED if corrects else TokenOrigin.BONUS
        forced = [proposal.forced for proposal in self.decided.proposals[:drafted]]
        heads = tuple(TokenOrigin.FORCED if each else TokenOrigin.DRAFTED for each in forced)
        origins = heads + (last,) * (len(self.tokens) - drafted)
        return CommittedTokens(self.tokens, origins, self.logprobs)


MAX_REQUESTS: Final = 32
"""Most requests for more samples at one position. Each brings up to four times as many as all before, so an honest edge
almost never gets a third."""


@dataclass(slots=True)
class Rejection:
    """A rejected proposal whose correction is not drawn yet; `tried` samples have failed so far."""

    proposal: Proposal
    position: int
    tried: int = 0
    _requests: int = 0

    @property
    def device_draws(self) -> bool:
        """In residual mode the device draws the correction, and the edge has to be informed of it."""
        return self.proposal.quantized is not None

    def note_request(self) -> None:
        """Count a request for more samples; raise SessionFailed after too many.

        Samples that often fail are probably not from the distribution that rejected.
        """
        self._requests += 1
        if self._requests > MAX_REQUESTS:
            raise SessionFailed(
                f"The edge has sent {self.tried} samples in place of a rejected token, and none of them fits; "
                "retry with another seed, or have the edge send another downlink form."
            )

    def correction(self, following: int | DownlinkForm | UnknownForm | None, *, policy: SamplingPolicy) -> int | None:
        """Return the token in place of the proposal; None if more samples are needed.

        The token may be outside the vocabulary. Raise ProtocolViolation if nothing can be drawn from `following`.
        """
        quantized = self.proposal.quantized
        if following is None:
            raise ProtocolViolation("The edge rejected a token and sent no correction for it.")
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
        # Each index is one draw: to use some again, or to skip some, would change the distribution.
        if isinstance(following, Samples) and following.start != self.tried:
            raise ProtocolViolation(
                f"The edge sent samples from {following.start} on, the device has tried {self.tried}."
            )
        token = correct(following, quantized, policy=policy, position=self.position)
        if token is None:
            assert isinstance(following, Samples)
            self.tried += len(following.ids)
        return token


_MAX_EARLY: Final = 64
"""Pieces that are kept while an earlier one is missing; each has at least one token."""


@dataclass(slots=True)
class EdgeOnlyDecoding:
    """The latest request for edge-only decoding.

    `first_round` is the first round of consecutive requests; an answer to any of them belongs to the same generation.
    `until` is the position up to which the edge decodes. `first`: no token has come since the session was opened, so
    that the edge has the prompt to compute. `early` holds pieces that arrived before an earlier one; `missed_at` is the
    number of committed tokens when a missing piece was last requested.
    """

    request: Draft
    first_round: int
    until: int
    first: bool = False
    early: list[Verdict] = field(default_factory=list)
    missed_at: int | None = None

    @property
    def stops(self) -> bool:
        return self.request.write == 0

    def concerns(self, verdict: Verdict) -> bool:
        return self.first_round <= verdict.round <= self.request.round

    def keep(self, verdict: Verdict) -> None:
        if len(self.early) < _MAX_EARLY:
            self.early.append(verdict)

    def take_early(self, length: int) -> Verdict | None:
        """Return a kept piece that a sequence of this length leads up to."""
        found = next((each for each in self.early if each.base is not None and each.base <= length), None)
        if found is not None:
            self.early.remove(found)
        return found

    def new_tokens(self, verdict: Verdict, *, text: Sequence[int], end_tokens: Collection[int]) -> tuple[int, ...]:
        """Return the tokens that a piece adds; raise ProtocolViolation if it does not continue `text`."""
        base, written = verdict.base, verdict.written
        assert base is not None
        assert written is not None
        known = len(text) - base
        if list(written[:known]) != list(text[base : base + len(written)]):
            raise ProtocolViolation("The edge has sent other tokens than before at the same position.")
        new = written[known:]
        if any(token in end_tokens for token in new[:-1]):
            raise ProtocolViolation("The edge has continued after an end token.")
        return new
