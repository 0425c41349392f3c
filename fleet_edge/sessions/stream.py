"""Stream: a device has asked its edge to write by itself, up to a position, token after token.

To the law each token is a bonus token behind an empty draft: the same random numbers, so in coupled mode the same text.
The device needs nothing that it does not have: it names the position that its text ends at, and is sent what follows.
So a request may come twice, late, or again after a loss, and does no harm.

Several tokens come of one step where the edge has guessed those that follow, and was right (see `guesses`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dssd.verification import Judgement
from fleet_edge.sessions.draft_results import DraftResult
from fleet_edge.sessions.limits import SessionLimits
from fleet_edge.sessions.waiting import ReceivedDraft
from schemas.messages import Draft
from schemas.policy import Mode


@dataclass(slots=True)
class Stream:
    """The latest request of a session, and how far it is met.

    Attributes:
        request: As it came.
        until: Position up to which the edge writes.
        sent: Position up to which the device was sent the text.
        due_at: Since when the next token is due (monotonic seconds).
        sent_at: When the device was last sent something, under whichever request (monotonic seconds).
        size: Payload bytes of the request.
        logged: Whether the first piece of it is in the session log.
    """

    request: Draft
    until: int
    sent: int
    due_at: float
    sent_at: float = -math.inf
    size: int = 0
    logged: bool = False
    _latest: Draft | None = None  # that was made of the request: it is asked for several times a step

    def may_wait(self, committed: int) -> bool:
        """Whether the device can do without the latest tokens for a while: it asks for more when it has half.

        Args:
            committed: Length of the text.
        """
        half = self.until - (self.request.write or 0) // 2
        return committed < self.until and not self.sent < half <= committed

    def next_draft(self, mode: Mode, *, base: int, digest: int) -> ReceivedDraft:
        """Return the empty draft behind which the next token is written.

        Args:
            mode: Of the session's policy.
            base: Length of the text.
            digest: Of that text.
        """
        if self._latest is None or self._latest.base != base:
            counts: Sequence[int] | None = () if mode is Mode.RESIDUAL else None
            # Its fields are the edge's own: they need no check.
            fields = {"base": base, "digest": digest, "fix": None, "counts": counts}
            self._latest = self.request.model_copy(update=fields)
        return ReceivedDraft(self._latest, self.due_at)

    def result(
        self, arrived: ReceivedDraft, judgement: Judgement, *, limits: SessionLimits, committed: int
    ) -> DraftResult:
        """Return what a step has written, as far as the device still asks for it.

        Args:
            arrived: The draft of the step, with the guesses as its tokens.
            judgement: What `dssd.verification.write` made of it.
            limits: The session's.
            committed: Length of the text that it stands on; less than `until`.
        """
        room = self.until - committed  # the device may ask for less by now than when the step began
        right = min(judgement.accepted, room)
        token = judgement.token if right < room else None
        head = arrived.draft.tokens[:right]
        tokens = head if token is None else (*head, token)
        finish = limits.finish(tokens, committed=committed + len(tokens))
        return DraftResult(arrived, right, right, token, None, finish, judgement.logprobs[: len(tokens)])
