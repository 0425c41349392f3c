"""Effect of a verdict on a session: the tokens that it commits, and what the drafter has to learn of it."""

from dataclasses import dataclass, field

from fleet_device.session.in_flight import DecidedDraft
from fleet_device.session.origins import CommittedTokens, TokenOrigin
from schemas.logprobs import TokenLogprobs
from schemas.messages import Draft, Verdict

__all__ = ["VerdictEffect"]


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
