"""Draft results: splits one judgement over pipelined drafts.

The drafts are judged as one; each is answered by a verdict of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dssd.distribution import Dist
from dssd.verification import Judgement
from fleet_edge.sessions.limits import SessionLimits
from fleet_edge.sessions.waiting import ReceivedDraft
from schemas.fields import TokenLogprobs
from schemas.reasons import Finish


@dataclass(frozen=True, slots=True)
class DraftResult:
    """One draft's part of a judgement.

    Attributes:
        arrived: The draft.
        accepted: Length of its accepted head.
        tested: Of its tokens, those decided on.
        token: The token after the head, drawn by the edge.
        p: Or the distribution at the rejection.
        finish: Whether the text ends.
        logprobs: Of `tokens`, and of the rejection, if they are asked for.
    """

    arrived: ReceivedDraft
    accepted: int
    tested: int
    token: int | None
    p: Dist | None
    finish: Finish
    logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that it adds to the text."""
        head = self.arrived.draft.tokens[: self.accepted]
        return head if self.token is None else (*head, self.token)

    @property
    def rejected(self) -> bool:
        return self.tested > self.accepted


def split_judgement(
    chain: Sequence[ReceivedDraft], judgement: Judgement, *, limits: SessionLimits, committed: int
) -> list[DraftResult]:
    """Divide a judgement among its drafts.

    Args:
        chain: The drafts, each standing on the one before.
        judgement: On their tokens as one draft.
        limits: The session's.
        committed: Length of the text that the chain stands on.

    Returns:
        A part for each draft that was decided on; those behind a rejection or the end of the text are void.
    """
    settled = []
    left, told = judgement.accepted, 0
    for place, arrived in enumerate(chain):
        drafted = arrived.draft.tokens
        head = drafted[:left]
        left -= len(head)
        rejected = len(head) < len(drafted)
        last = rejected or place == len(chain) - 1
        token = judgement.token if last and not limits.ends(head) else None
        p = judgement.p if rejected else None
        new = head if token is None else (*head, token)
        committed += len(new)
        finish = limits.finish(new, committed=committed)
        rows = judgement.logprobs[told : told + len(new) + (p is not None)]
        told += len(rows)
        settled.append(DraftResult(arrived, len(head), len(head) + rejected, token, p, finish, rows))
        if rejected or finish is not Finish.NO:
            break
    return settled
