"""Session limits: what an edge grants, and the check that a draft keeps to it."""

from collections.abc import Sequence
from dataclasses import dataclass

from fleet_edge.errors import DraftFault
from schemas.messages import Draft
from schemas.policy import Mode
from schemas.reasons import Action, FaultCode, Finish


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What the edge grants a session.

    Attributes:
        max_new_tokens: Most tokens of text.
        max_draft: Most tokens in one draft.
        window: Most drafts under way.
        vocabulary: Token ids are below this.
        end_tokens: Ids that end the text.
        sample_requests: Most requests of further samples after one rejection.
    """

    max_new_tokens: int
    max_draft: int
    window: int
    vocabulary: int
    end_tokens: frozenset[int]
    sample_requests: int = 32

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the text ends with these tokens."""
        return bool(tokens) and tokens[-1] in self.end_tokens

    def finish(self, tokens: Sequence[int], *, committed: int) -> Finish:
        """Return whether the text ends, and why.

        Args:
            tokens: Its latest.
            committed: Its length with them.
        """
        if self.ends(tokens):
            return Finish.STOP
        return Finish.LENGTH if committed >= self.max_new_tokens else Finish.NO

    def check(self, draft: Draft, *, mode: Mode) -> None:
        """Check what a draft holds, whatever text it stands on.

        Raises:
            DraftFault: No text could take it.
        """
        end = draft.base + len(draft.tokens)
        if len(draft.tokens) > self.max_draft:
            raise DraftFault(
                FaultCode.TOO_LONG,
                Action.GIVE_UP,
                f"The draft has {len(draft.tokens)} tokens; at most {self.max_draft} were agreed.",
            )
        if end > self.max_new_tokens:
            raise DraftFault(
                FaultCode.TOO_LONG,
                Action.GIVE_UP,
                f"The draft ends at token {end}; the text has at most {self.max_new_tokens}.",
            )
        if any(token in self.end_tokens for token in draft.tokens[:-1]):
            raise DraftFault(FaultCode.TOKEN, Action.GIVE_UP, "The draft goes on behind an end-of-sequence token.")
        ids = (*draft.tokens, draft.fix) if draft.fix is not None else draft.tokens
        if any(token >= self.vocabulary for token in ids):
            raise DraftFault(
                FaultCode.TOKEN,
                Action.GIVE_UP,
                f"The draft holds a token id outside the vocabulary of {self.vocabulary}.",
            )
        if (mode is Mode.RESIDUAL and draft.tried is None) != (draft.counts is not None):
            raise DraftFault(
                FaultCode.COUNTS,
                Action.GIVE_UP,
                "A draft has one count for each token in residual mode, and none in coupled mode.",
            )
