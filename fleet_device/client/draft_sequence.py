"""Draft sequence: keeps the draft model in step with a session, ahead of the text, and back where it went astray."""

from collections.abc import Callable
from dataclasses import dataclass

from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.suffix.drafter import SuffixDrafter
from fleet_device.session.machine import DeviceSession, VerdictEffect

__all__ = ["DraftSequence"]


@dataclass(frozen=True, slots=True)
class DraftSequence:
    """A drafter at work for a session.

    Raises:
        DrafterError: By every method: the draft model failed, or was given a token that it does not know.

    Attributes:
        session: Whose text it drafts for; counts the time that the draft model takes.
        drafter: The draft model.
        clock: Monotonic seconds.
    """

    session: DeviceSession
    drafter: Drafter
    clock: Callable[[], float]

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

    def draft(self, limit: int) -> bool:
        """Draft one token.

        Args:
            limit: Tokens that the draft may have.

        Returns:
            False if none is to be drafted, so that the target writes the next one alone: the draft is long enough, the
            draft model's context ends here, or the drafter has no idea.
        """
        session, drafter = self.session, self.drafter
        if not session.room(limit) or len(session.request.prompt) + session.position >= drafter.context:
            return False
        started = self.clock()
        q = drafter.next(session.request.policy)
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
        session, drafter = self.session, self.drafter
        started = self.clock()
        q = drafter.next(session.request.policy)
        if q is None:
            return None
        token = session.write_alone(q)
        if session.ended is None:
            drafter.extend((token,))
        session.counters.draft_ms += (self.clock() - started) * 1e3
        return token

    def _observe(self) -> None:
        """Let what drafts from earlier text learn from what is committed."""
        if (source := self.source) is not None:
            source.observe(len(self.session.request.prompt) + len(self.session.committed))
