"""Session at a simulated edge: what is committed, computed, waiting and being written."""

import math
from dataclasses import dataclass, field

from fleet_cli.edge.advise.simulation.messages import Draft, SimulatedText, Verdict, Write
from fleet_device.pacing.contract import ReportedLoad


@dataclass(slots=True)
class Stream:
    """What the edge was last asked to write by itself.

    Attributes:
        request: As it came.
        until: Position up to which it writes.
        sent: Position up to which the device was sent the text.
        sent_at: When it was last sent something (seconds).
        due_at: Since when the next token is due (seconds).
    """

    request: Write
    until: int
    sent: int
    due_at: float
    sent_at: float = -math.inf

    def may_wait(self, committed: int) -> bool:
        """Whether the device can do without the latest tokens for a while: it asks for more when it has half."""
        half = self.until - self.request.tokens // 2
        return committed < self.until and not self.sent < half <= committed


@dataclass(slots=True)
class Session:
    """A session.

    Attributes:
        key: Its number.
        text: What is written.
        committed: Tokens of it that are final.
        computed: Tokens of prompt and text whose keys and values are stored.
        waiting: By position, drafts that nothing has decided on, and when they came (seconds).
        stream: What it is asked to write by itself.
        used: Number of the step that it was last in.
        epoch: Number of rejections so far.
    """

    key: int
    text: SimulatedText
    committed: int = 0
    computed: int = 0
    waiting: dict[int, tuple[Draft, float]] = field(default_factory=dict)
    stream: Stream | None = None
    used: int = 0
    epoch: int = 0

    @property
    def finished(self) -> bool:
        """Whether the text has come to its end."""
        return self.committed >= self.text.length

    @property
    def backlog(self) -> int:
        """Tokens to compute before the last, which comes with a draft."""
        return max(0, self.text.prompt + self.committed - 1 - self.computed)

    @property
    def streams(self) -> bool:
        """Whether the edge is to write a token by itself now."""
        return self.stream is not None and not self.finished and self.committed < self.stream.until

    @property
    def ready_at(self) -> float | None:
        """Since when there is something to verify (seconds); None if there is nothing."""
        if self.finished:
            return None
        if (waiting := self.waiting.get(self.committed)) is not None:
            return waiting[1]
        return self.stream.due_at if self.streams and self.stream is not None else None

    def chain(self, most: int) -> list[Draft]:
        """Return the drafts that can be verified at once; none where the edge writes by itself."""
        chain, base, left = list[Draft](), self.committed, most
        while (waiting := self.waiting.get(base)) is not None:
            draft = waiting[0]
            if chain and draft.tokens > left:
                break
            chain.append(draft)
            left -= draft.tokens
            base += draft.tokens
            if not draft.more or not draft.tokens:
                break
        return chain

    def take_draft(self, draft: Draft, *, at: float) -> None:
        """A draft has come; one that stands on a text that is not to be is void."""
        if draft.epoch == self.epoch:
            self.stream = None
            self.waiting[draft.base] = (draft, at)

    def take_write(self, request: Write, *, at: float) -> None:
        """A request to write has come."""
        self.waiting.clear()
        until = min(request.base + request.tokens, self.text.length)
        sent_at = -math.inf if self.stream is None else self.stream.sent_at
        self.stream = Stream(request, until=until, sent=request.base, due_at=at, sent_at=sent_at)

    def settle(
        self, chain: list[Draft], *, guesses: int, at: float, compute_s: float, load: ReportedLoad
    ) -> list[Verdict]:
        """Commit what stands of drafts, or what the edge has written; return the verdicts on the drafts.

        Args:
            chain: The drafts.
            guesses: Tokens that the edge has guessed, where it writes by itself.
            at: When (seconds).
            compute_s: Of the step.
            load: Of the edge.
        """
        before, drafted = self.committed, guesses + sum(draft.tokens for draft in chain)
        verdicts = []
        if not chain:
            right = self.text.guessed[before : before + guesses]
            self.committed += 1 + next((place for place, each in enumerate(right) if not each), len(right))
            if self.stream is not None:
                self.stream.due_at = at
        for draft in chain:
            _, came_at = self.waiting.pop(draft.base)
            stands = self.text.stands[draft.base : draft.base + draft.tokens]
            accepted = next((place for place, each in enumerate(stands) if not each), draft.tokens)
            self.committed += accepted
            rejected = accepted < draft.tokens
            drawn = int(rejected or (not draft.more and not self.finished))
            self.committed += drawn
            chained = drafted - draft.tokens
            queue_s = max(0.0, at - compute_s - came_at)
            verdicts.append(Verdict(self.key, draft, accepted, drawn, compute_s, load, queue_s, chained))
            if rejected:
                self.waiting.clear()
                self.epoch += 1
                break
        # What was computed of rejected tokens is forgotten; the last committed token is computed anew.
        self.computed = min(self.text.prompt + before + drafted, self.text.prompt + self.committed - 1)
        return verdicts
