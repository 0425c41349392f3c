"""An answer: a verdict beside the draft that it decides on, held against what a correct edge may say to it."""

from dataclasses import dataclass

from dssd.proposal import Proposal
from fleet_device.errors import ProtocolViolation
from schemas.messages import Draft, Verdict
from schemas.reasons import Finish

__all__ = ["Answer"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What an edge said to a draft.

    Attributes:
        verdict: The edge's.
        draft: That it decides on.
        proposals: How the draft's tokens were drawn.
    """

    verdict: Verdict
    draft: Draft
    proposals: tuple[Proposal, ...]

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
        return self.proposals[accepted] if accepted < len(self.draft.tokens) else None

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
