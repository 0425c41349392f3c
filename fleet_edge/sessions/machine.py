"""Edge session: the protocol's state machine, without I/O and without a clock.

Invariant: `tokens` is prompt and committed text; drafts wait behind it, and `chain` is what can be verified now. After
a rejection in residual mode nothing can, until a draft brings the correction that the device has drawn. Where the
device has asked the edge to write by itself, `chain` is an empty draft behind the text, again and again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from dssd.distribution import Dist
from dssd.verification import Judgement
from fleet_edge.counters import SegmentCounters
from fleet_edge.errors import DraftFault, desync
from fleet_edge.sessions.acceptance import RecentAcceptance
from fleet_edge.sessions.constraint import Constraint
from fleet_edge.sessions.draft_results import DraftResult, split_judgement
from fleet_edge.sessions.guesses import MAX_GUESS, Guesses
from fleet_edge.sessions.kinds import CORRECTED, kinds_of, kinds_of_written
from fleet_edge.sessions.limits import SessionLimits
from fleet_edge.sessions.rounds import Rounds
from fleet_edge.sessions.stream import Stream
from fleet_edge.sessions.token_times import TokenTimes
from fleet_edge.sessions.waiting import ReceivedDraft, WaitingDrafts
from schemas.fields import MAX_TOKENS, EdgeLoad, TokenLogprobs
from schemas.messages import Close, Draft, Open
from schemas.policy import SamplingPolicy
from schemas.reasons import Action, FaultCode, Finish
from schemas.vocabulary import EMPTY_DIGEST, extend_digest

_ID_BYTES, _FLOAT_BYTES = 4, 4


@dataclass(frozen=True, slots=True)
class DraftReceipt:
    """What is due at once on the arrival of a draft; nothing if it waits to be verified, or is void.

    Attributes:
        repeat: The verdict's bytes, if it was answered before.
        request: Whether it asks for samples of the last rejection, to be answered from memory.
        written: Whether it asks for text, and no more is to come than there is.
    """

    repeat: bytes | None = None
    request: bool = False
    written: bool = False


@dataclass(slots=True)
class EdgeSession:
    """The state machine.

    Attributes:
        handle: Short name, per edge.
        session: The session's own name.
        attempt: Of the Open that it answers.
        device: Whose it is; drafts of another device never reach it.
        policy: Sampling.
        limits: What was granted.
        tokens: Prompt and committed text.
        prompt_length: Where the text begins.
        kinds: How each token of the text came into it, of those that were committed here; a character each.
        counters: What has been counted since the Open: of drafts here, of answers by whoever gives them.
        logprobs: Of so many of the likeliest tokens at each place the device asks for the log-probabilities; None: of
            none, nor of the text's own.
        told: The text's own, where they are asked for; the end of it, as far as it was written here.
        recent: How much of its latest drafts was accepted.
        times: When its tokens were committed, as far as whoever answers has told.
        finished: Whether the text has ended; drafts are void then.
        constraint: The grammar that the policy holds, if there is one.
        sent: Position up to which the device was ever sent the text.
        draft_model: That it drafts with, and its quantization, as it says.
        told_load: What its device was told last of the edge's load.
    """

    handle: int
    session: bytes
    attempt: int
    device: str
    policy: SamplingPolicy
    limits: SessionLimits
    tokens: list[int]
    prompt_length: int
    kinds: bytearray = field(default_factory=bytearray)
    counters: SegmentCounters = field(default_factory=SegmentCounters)
    logprobs: int | None = None
    told: list[TokenLogprobs] = field(default_factory=list)
    recent: RecentAcceptance = field(default_factory=RecentAcceptance)
    times: TokenTimes = field(default_factory=TokenTimes)
    finished: bool = False
    constraint: Constraint | None = None
    sent: int = 0
    draft_model: str = ""
    told_load: EdgeLoad | None = None
    _epoch: int = 0
    _digest: int = EMPTY_DIGEST
    _rejected: Dist | None = None
    _rejected_logprobs: tuple[TokenLogprobs, ...] = ()
    _requests: int = 0  # of further samples, since the rejection
    _failure: DraftFault | None = None
    _stream: Stream | None = None
    _guesses: Guesses | None = None
    _waiting: WaitingDrafts = field(default_factory=WaitingDrafts)
    _rounds: Rounds = field(init=False)

    def __post_init__(self) -> None:
        self._rounds = Rounds(self.limits.window)

    @classmethod
    def from_open(
        cls, message: Open, *, handle: int, device: str, limits: SessionLimits, constraint: Constraint | None = None
    ) -> "EdgeSession":
        """Begin, or go on where `message.resume` ends."""
        resumed = message.resume or ()
        return cls(
            handle=handle,
            session=message.session,
            attempt=message.attempt,
            device=device,
            policy=message.policy,
            limits=limits,
            tokens=[*message.prompt, *resumed],
            prompt_length=len(message.prompt),
            logprobs=message.logprobs,
            constraint=constraint,
            draft_model=f"{message.draft_model} {message.quantization}",
            _digest=extend_digest(EMPTY_DIGEST, resumed),
        )

    @property
    def committed(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def logprobs_bytes(self) -> int:
        """Bytes that the log-probabilities of one token take on the wire, at most."""
        return 0 if self.logprobs is None else _FLOAT_BYTES + (_ID_BYTES + _FLOAT_BYTES) * self.logprobs

    @property
    def text(self) -> tuple[int, ...]:
        """What is committed, without the prompt."""
        return tuple(self.tokens[self.prompt_length :])

    @property
    def rejected(self) -> Dist | None:
        """The target's distribution at the last rejection, while its correction is awaited."""
        return self._rejected

    @property
    def rejected_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """What the device was told of log-probabilities there, if it asks for them."""
        return self._rejected_logprobs

    # Arrival

    def admit(self, arrived: ReceivedDraft) -> DraftReceipt:
        """Count a draft, check it, and queue it.

        Raises:
            DraftFault: It cannot be judged; nothing but the counters has changed.
        """
        draft = arrived.draft
        self.counters += SegmentCounters(uplink_bytes=arrived.size)
        if (repeat := self._rounds.verdict(draft.round)) is not None:
            return DraftReceipt(repeat=repeat)
        if (failure := self._failure) is not None:
            raise DraftFault(failure.code, failure.action, str(failure))
        self.limits.check(draft, mode=self.policy.mode)
        if draft.write is not None:
            return self._admit_stream(draft, draft.write, arrived)
        if self._rounds.first_seen(draft.round):
            # Once, whether it is judged or void.
            self.counters += SegmentCounters(drafted=len(draft.tokens))
        if self._is_void(draft):
            return DraftReceipt()
        if draft.epoch > self._epoch:
            raise desync("The draft's epoch is ahead of the edge's.")
        if draft.tried is not None:
            return self._admit_request(draft)
        self._check_place(draft)
        if draft.fix is not None:
            self._commit((draft.fix,))
            self._rejected = None
        self._stream = None
        self._waiting.add(arrived)
        return DraftReceipt()

    def remember(self, round_: int, payload: bytes) -> None:
        """Keep a verdict's bytes for repeats."""
        self._rounds.remember(round_, payload)
        self.sent = self.committed

    # Verification

    @property
    def ready(self) -> ReceivedDraft | None:
        """The draft that stands on the committed text, if it is there, or the one that the edge makes up to go on."""
        if self.finished or self._rejected is not None:
            return None
        return self._waiting.at(self.committed) or self._next_of_stream()

    def chain(
        self, most: int, *, guesses: Callable[[float], int] | None = None, forced: int = MAX_GUESS
    ) -> tuple[ReceivedDraft, ...]:
        """Return the drafts that can be verified in one go, each standing on the one before.

        Args:
            most: Most tokens in all; the first draft always comes, however long.
            guesses: By how likely one is right, how many tokens to guess where the edge writes by itself; by default
                none.
            forced: Most tokens to guess there because the grammar forces them.

        Raises:
            DraftFault: The first draft came early, and turns out to stand on another text; it is forgotten.
        """
        if (ready := self.ready) is None:
            return ()
        if ready.draft.write is not None:
            return (self._with_guesses(ready, guesses, most=most, most_forced=forced),)
        return self._waiting.chain(base=self.committed, digest=self._digest, most=most)

    def wants_token_after(self, chain: Sequence[ReceivedDraft]) -> bool:
        """Whether a bonus token is due once the whole chain is accepted."""
        length = sum(len(arrived.draft.tokens) for arrived in chain)
        return not chain[-1].draft.more and self.committed + length < self.limits.max_new_tokens

    def awaits(self, chain: Sequence[ReceivedDraft]) -> bool:
        """Whether what was computed for a chain still decides something, whatever has arrived since.

        A text that has ended wants no more, and a draft may have been given up for a request to write, or a request for
        a draft. But a token that the edge writes by itself is the same, whichever request it was computed under.
        """
        ready, first = self.ready, chain[0]
        if ready is None:
            return False
        if first.draft.write is not None:
            return ready.draft.write is not None and ready.draft.base == first.draft.base
        return all(self._waiting.at(arrived.draft.base) is arrived for arrived in chain)

    def settle(self, chain: Sequence[ReceivedDraft], judgement: Judgement) -> list[DraftResult]:
        """Commit what a judgement on the chain accepts.

        Returns:
            A verdict's content for each draft that was decided on; the others are void.
        """
        if chain[0].draft.write is not None:
            return [self._settle_written(chain[0], judgement)]
        settled = split_judgement(chain, judgement, limits=self.limits, committed=self.committed)
        place = 0
        for part in settled:
            self._waiting.remove(part.arrived)
            self._extend(part.tokens, kinds_of(part, place=place, forced=judgement.forced))
            place += len(part.tokens)
            self.told.extend(part.logprobs[: len(part.tokens)])
            self.counters += SegmentCounters(tokens=len(part.tokens), accepted=part.accepted, tested=part.tested)
            self.recent.count(tested=part.tested, accepted=part.accepted)
            if part.rejected:
                self._reject(part.p)
                self._rejected_logprobs = part.logprobs[len(part.tokens) :]
            if part.finish is not Finish.NO:
                self._finish()
        self.counters += SegmentCounters(forced=len(judgement.forced))
        return settled

    # Writing alone

    @property
    def stream(self) -> Stream | None:
        """The device's request to write, if that is the latest that it has asked for."""
        return self._stream

    @property
    def finish(self) -> Finish:
        """Whether the text ends where it is, and why."""
        if not self.committed:
            return Finish.NO
        return self.limits.finish(self.tokens[-1:], committed=self.committed)

    def _with_guesses(
        self, ready: ReceivedDraft, guesses: Callable[[float], int] | None, *, most: int, most_forced: int
    ) -> ReceivedDraft:
        """Put behind a stream's text what is likely to follow, as far as that pays and the device has asked."""
        assert self._stream is not None
        # The token behind the guesses is to be wanted too.
        room = max(0, min(most, self._stream.until - self.committed) - 1)
        if self.constraint is not None:
            # What is right for certain costs less in this step than in one of its own.
            forced = self.constraint.guess(self.text, min(room, most_forced))
            if forced := self._before_end(forced):
                return replace(ready, draft=ready.draft.model_copy(update={"tokens": forced}))
        if guesses is None:
            return ready
        if self._guesses is None:
            self._guesses = Guesses()
        # What follows is looked up even if it is not to be used: that tells how often it would have been right.
        found = self._guesses.next(self.tokens, ends=self.limits.end_tokens)
        tokens = found[: min(room, guesses(self._guesses.rate))]
        return replace(ready, draft=ready.draft.model_copy(update={"tokens": tokens})) if tokens else ready

    def _before_end(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tokens before an end token: nothing is written behind that, which comes by itself."""
        end = next((place for place, token in enumerate(tokens) if token in self.limits.end_tokens), len(tokens))
        return tokens[:end]

    def _settle_written(self, arrived: ReceivedDraft, judgement: Judgement) -> DraftResult:
        """Commit what the edge has written by itself, as far as the device still asks for it."""
        assert self._stream is not None
        result = self._stream.result(arrived, judgement, limits=self.limits, committed=self.committed)
        written = len(result.tokens)
        self._extend(result.tokens, kinds_of_written(written, forced=judgement.forced))
        self.told.extend(result.logprobs)
        self.counters += SegmentCounters(
            tokens=written,
            streamed=written,
            guessed=len(arrived.draft.tokens),
            guessed_right=result.accepted,
            forced=sum(place < written for place in judgement.forced),
        )
        if result.finish is not Finish.NO:
            self._finish()
        return result

    def take_written(self, stream: Stream, *, at: float, most: int = MAX_TOKENS) -> tuple[int, ...]:
        """Return the text that the device was not sent yet, its beginning; from now (monotonic seconds) on it was.

        Args:
            stream: The device's request.
            at: Now.
            most: Tokens.
        """
        begin, stream.sent_at = stream.sent, at
        stream.sent = min(self.committed, begin + most)
        self.sent = max(self.sent, stream.sent)
        self._rounds.answered(stream.request.round)
        return tuple(self.tokens[self.prompt_length + begin : self.prompt_length + stream.sent])

    def logprobs_from(self, position: int, number: int) -> tuple[TokenLogprobs, ...]:
        """Return those of some tokens of the text; none where the device does not ask for them."""
        if self.logprobs is None:
            return ()
        first = len(self.told) - (self.committed - position)
        return tuple(self.told[first : first + number])

    def close(self, message: Close) -> None:
        """Take the device's last correction, if no draft carried it, and end."""
        fix, p = message.fix, self._rejected
        if fix is not None and p is not None and message.tokens == self.committed + 1 and p.probability(fix) > 0.0:
            self._commit((fix,))
        self._finish()

    @property
    def failure(self) -> DraftFault | None:
        """Why it ended without a text, if it did."""
        return self._failure

    def fail(self, fault: DraftFault) -> None:
        """End without a text; whatever else is drafted is answered with the same fault."""
        self._failure = fault
        self._finish()

    # Within

    def _is_void(self, draft: Draft) -> bool:
        """Whether nobody waits for an answer: it had one long ago, a rejection voided it, or it was delivered twice."""
        if self.finished or self._rounds.passed(draft.round) or draft.epoch < self._epoch:
            return True
        return draft.round in self._waiting

    def _check_place(self, draft: Draft) -> None:
        """Check what the draft stands on: the text, or what may come behind it, within the window."""
        if draft.fix is not None or draft.base == self.committed:
            self._check_prefix(draft)
        elif draft.base < self.committed:
            raise desync(f"The draft stands on {draft.base} tokens, the edge has {self.committed}.")
        if self._waiting.at(draft.base) is None and len(self._waiting) >= self.limits.window:
            raise DraftFault(
                FaultCode.TOO_LONG, Action.RESUME, f"More than {self.limits.window} drafts are under way at once."
            )

    def _check_prefix(self, draft: Draft) -> None:
        """Compare position and digest, the correction counted in."""
        fixes = () if draft.fix is None else (draft.fix,)
        if fixes and self._rejected is None:
            raise desync("The draft corrects a position that was not rejected.")
        if draft.base != self.committed + len(fixes) or draft.digest != extend_digest(self._digest, fixes):
            raise desync("The draft stands on another text than the edge's.")
        if self._rejected is not None and not fixes:
            raise desync("The draft lacks the correction of the rejected position.")
        if fixes and self._rejected is not None and self._rejected.probability(fixes[0]) == 0.0:
            raise desync("The correction is a token that the target model rules out.")

    def _admit_request(self, draft: Draft) -> DraftReceipt:
        if self._rejected is None or draft.base != self.committed:
            raise desync("Samples are asked for, but nothing was rejected.")
        self._requests += 1
        if self._requests > self.limits.sample_requests:
            raise DraftFault(
                FaultCode.QUOTA,
                Action.GIVE_UP,
                f"Samples were asked for more than {self.limits.sample_requests} times after one rejection.",
            )
        return DraftReceipt(request=True)

    def _admit_stream(self, draft: Draft, write: int, arrived: ReceivedDraft) -> DraftReceipt:
        """Take a request to write: from now on it is the only one."""
        stream = self._stream
        latest = stream.request.round if stream is not None else -1
        if draft.epoch < self._epoch or draft.round < max(latest, self._waiting.latest):
            return DraftReceipt()  # delivered late: the device has asked for something else since
        if draft.round != latest and self._rounds.passed(draft.round):
            return DraftReceipt()
        if draft.epoch > self._epoch:
            raise desync("The request's epoch is ahead of the edge's.")
        if self._rejected is not None:
            self._check_prefix(draft)
            self._commit(() if draft.fix is None else (draft.fix,))
            self._rejected = None
        elif draft.base > self.committed or draft.digest != self._digest_at(draft.base):
            raise desync("The request to write stands on another text than the edge's.")
        self._waiting.void()
        until = min(draft.base + write, self.limits.max_new_tokens)
        self.sent = max(self.sent, draft.base)
        sent_at = -math.inf if stream is None else stream.sent_at
        self._stream = Stream(
            draft, until=until, sent=draft.base, due_at=arrived.at, sent_at=sent_at, size=arrived.size
        )
        # Where more is about to be written, what the device lacks comes with it.
        return DraftReceipt(written=self.finished or self.committed >= until)

    def _next_of_stream(self) -> ReceivedDraft | None:
        stream = self._stream
        if stream is None or self.committed >= stream.until:
            return None
        return stream.next_draft(self.policy.mode, base=self.committed, digest=self._digest)

    def _digest_at(self, position: int) -> int:
        if position == self.committed:
            return self._digest
        return extend_digest(EMPTY_DIGEST, self.tokens[self.prompt_length : self.prompt_length + position])

    def _commit(self, tokens: Sequence[int]) -> None:
        self._extend(tokens, CORRECTED * len(tokens))
        # The device's own corrections: it has what there is to tell of them.
        self.told.extend(self._rejected_logprobs[: len(tokens)])
        self.counters += SegmentCounters(tokens=len(tokens))

    def _extend(self, tokens: Sequence[int], kinds: bytes) -> None:
        self.tokens.extend(tokens)
        self.kinds.extend(kinds)
        self._digest = extend_digest(self._digest, tokens)

    def _finish(self) -> None:
        self.finished = True
        self._waiting.void()

    def _reject(self, p: Dist | None) -> None:
        self._epoch += 1
        self._waiting.void()
        self._rejected = p
        self._requests = 0
