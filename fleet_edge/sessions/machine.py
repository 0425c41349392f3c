"""Edge session: the protocol's state machine, without I/O and without a clock.

Invariant: `tokens` is the prompt and the committed generation. Drafts wait behind it, and `chain` returns what can be
verified now: nothing after a rejection in residual mode, until a draft brings the device's correction. In edge-only
decoding `chain` is an empty draft after the generation, step by step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Final

from fleet_edge.errors import DraftFault, tokens_differ
from fleet_edge.session_log.counters import SegmentCounters
from fleet_edge.sessions.admission import SessionLimits
from fleet_edge.sessions.drafts import (
    DraftResult,
    PendingCorrection,
    ReceivedDraft,
    Rounds,
    WaitingDrafts,
    split_judgement,
)
from fleet_edge.sessions.grammars import MAX_FORCED, Constraint
from fleet_edge.sessions.states import EdgeSessionEvent, EdgeSessionState, next_state
from fleet_edge.sessions.statistics import RecentAcceptance, TokenTimes
from sampling.verification import Judgement
from schemas.fields import MAX_TOKENS, EdgeLoad, TokenLogprobs
from schemas.messages import Close, Draft, Open
from schemas.names import model_name
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import Action, FaultCode, Finish
from schemas.vocabulary import EMPTY_DIGEST, extend_digest

_SAMPLE_REQUESTS: Final = 32
"""Requests for further samples after one rejection; a sound device needs more than a few almost never."""


@dataclass(slots=True)
class DecodeRequest:
    """A device's request for edge-only decoding of positions up to `until`.

    Each token is a bonus token after an empty draft, with the same random numbers, so coupled mode gives the same
    generation. The request names the position where the device's sequence ends and is answered with what follows, so it
    may arrive twice, late, or again after a loss. Tokens up to `sent` were sent, last at `sent_at`; the next is due
    since `due_at` (monotonic seconds). `size` is the payload in bytes; `logged`: the first piece is in the session log.
    """

    request: Draft
    until: int
    sent: int
    due_at: float
    sent_at: float = -math.inf
    size: int = 0
    logged: bool = False
    _latest: Draft | None = None  # cached: asked for several times a step

    def may_wait(self, committed: int) -> bool:
        """The latest tokens may be sent later: the device asks for more once it has half."""
        half = self.until - (self.request.write or 0) // 2
        return committed < self.until and not self.sent < half <= committed

    def next_draft(self, mode: Mode, *, base: int, digest: int) -> ReceivedDraft:
        if self._latest is None or self._latest.base != base:
            counts: Sequence[int] | None = () if mode is Mode.RESIDUAL else None
            # These fields are the edge's own and need no validation.
            fields = {"base": base, "digest": digest, "fix": None, "counts": counts}
            self._latest = self.request.model_copy(update=fields)
        return ReceivedDraft(self._latest, self.due_at)

    def result(
        self, arrived: ReceivedDraft, judgement: Judgement, *, limits: SessionLimits, committed: int
    ) -> DraftResult:
        """Limit the tokens of a step to those that the device still asks for.

        `arrived` is the step's draft with speculated tokens; `committed` counts the tokens before it, fewer than
        `until`.
        """
        room = self.until - committed  # the request may have changed during the step
        right = min(judgement.accepted, room)
        token = judgement.token if right < room else None
        head = arrived.draft.tokens[:right]
        tokens = head if token is None else (*head, token)
        finish = limits.finish(tokens, committed=committed + len(tokens))
        return DraftResult(arrived, right, right, token, None, finish, judgement.logprobs[: len(tokens)])


_ID_BYTES, _FLOAT_BYTES = 4, 4


@dataclass(frozen=True, slots=True)
class DraftReceipt:
    """Immediate reply to a draft: nothing if it waits for verification or is void.

    `repeat` is the verdict already given; `request` asks for samples of the last rejection, answered from memory;
    `written` asks for edge-only decoding that is already done.
    """

    repeat: bytes | None = None
    request: bool = False
    written: bool = False


@dataclass(slots=True)
class EdgeSession:
    """State machine of one session at the edge; its states are those of `fleet_edge.sessions.states`.

    Attributes:
        logprobs: Number of top log-probabilities that the device requests; None for no log-probabilities.
        echo: Whether it requests those of the prompt too.
        prompt_logprobs: Those of the prompt's tokens after the first, as far as they are computed.
        sent: Position up to which the device was sent tokens.
        rejection: The last rejection, while its correction is awaited.
        failure: Fault with which the session has ended; it answers all further drafts.
    """

    handle: int
    session: bytes
    attempt: int
    device: str
    policy: SamplingPolicy
    limits: SessionLimits
    tokens: list[int]
    prompt_length: int
    counters: SegmentCounters = field(default_factory=SegmentCounters)
    logprobs: int | None = None
    echo: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_logprobs: list[TokenLogprobs] = field(default_factory=list)
    recent: RecentAcceptance = field(default_factory=RecentAcceptance)
    times: TokenTimes = field(default_factory=TokenTimes)
    state: EdgeSessionState = EdgeSessionState.DRAFTING
    constraint: Constraint | None = None
    sent: int = 0
    progress_at: float = -math.inf  # when its device was last notified of the progress
    draft_model: str = ""
    reported_load: EdgeLoad | None = None
    rejection: PendingCorrection | None = None
    failure: DraftFault | None = None
    decode: DecodeRequest | None = None
    _epoch: int = 0
    _digest: int = EMPTY_DIGEST
    _waiting: WaitingDrafts = field(default_factory=WaitingDrafts)
    _rounds: Rounds = field(init=False)

    def __post_init__(self) -> None:
        self._rounds = Rounds(self.limits.window)

    @classmethod
    def from_open(
        cls, message: Open, *, handle: int, device: str, limits: SessionLimits, constraint: Constraint | None = None
    ) -> "EdgeSession":
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
            echo=bool(message.echo),
            constraint=constraint,
            draft_model=model_name(message.draft_model, message.quantization) or "",
            _digest=extend_digest(EMPTY_DIGEST, resumed),
        )

    @property
    def finished(self) -> bool:
        return self.state in (EdgeSessionState.FINISHED, EdgeSessionState.FAILED)

    @property
    def committed(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def longest_committed(self) -> int:
        """Most tokens that the device may have: it may have corrected a rejection without saying so yet."""
        return self.committed + (self.rejection is not None)

    @property
    def logprobs_bytes(self) -> int:
        return 0 if self.logprobs is None else _FLOAT_BYTES + (_ID_BYTES + _FLOAT_BYTES) * self.logprobs

    @property
    def unscored(self) -> int:
        """Number of the prompt's tokens whose log-probabilities are requested and not computed yet."""
        return self.prompt_length - 1 - len(self.prompt_logprobs) if self.echo else 0

    @property
    def text(self) -> tuple[int, ...]:
        return tuple(self.tokens[self.prompt_length :])

    # Arrival

    def admit(self, arrived: ReceivedDraft) -> DraftReceipt:
        """Count a draft, check it, and queue it; a `DraftFault` leaves only the counters changed."""
        draft = arrived.draft
        self.counters.uplink_bytes += arrived.size
        if (repeat := self._rounds.verdict(draft.round)) is not None:
            return DraftReceipt(repeat=repeat)
        if (failure := self.failure) is not None:
            raise DraftFault(failure.code, failure.action, str(failure))
        self.limits.check(draft, mode=self.policy.mode)
        if draft.write is not None:
            return self._admit_decode(draft, draft.write, arrived)
        if self._rounds.first_seen(draft.round):
            # Counted once, whether it is judged or void.
            self.counters.drafted += len(draft.tokens)
        answered = self._rounds.passed(draft.round) or draft.round in self._waiting
        if self.finished or answered or draft.epoch < self._epoch:
            return DraftReceipt()  # answered long ago, voided by a rejection, or delivered twice
        if draft.epoch > self._epoch:
            raise tokens_differ("The draft's epoch is ahead of the edge's.")
        if draft.tried is not None:
            return self._admit_request(draft)
        self._check_place(draft)
        self._correct(draft.fix)
        self._move(EdgeSessionEvent.DRAFT)
        self.decode = None
        self._waiting.add(arrived)
        return DraftReceipt()

    def remember(self, round_: int, payload: bytes) -> None:
        """Keep a verdict's bytes for repeats."""
        self._rounds.remember(round_, payload)
        self.sent = self.committed

    # Verification

    @property
    def ready(self) -> ReceivedDraft | None:
        """The draft to verify next; none while the session's grammar is not ready."""
        return None if self.constraint is not None and not self.constraint.ready else self._next_draft

    @property
    def _next_draft(self) -> ReceivedDraft | None:
        """The draft at the committed position, or the next of edge-only decoding."""
        if self.state is EdgeSessionState.DRAFTING:
            return self._waiting.at(self.committed)
        if self.state is not EdgeSessionState.DECODING or self.decode is None or self.committed >= self.decode.until:
            return None
        return self.decode.next_draft(self.policy.mode, base=self.committed, digest=self._digest)

    def chain(self, most: int, *, forced: int = MAX_FORCED) -> tuple[ReceivedDraft, ...]:
        """Return the drafts that can be verified at once, each starting at the end of the one before.

        They hold at most `most` tokens, but always the first draft; one of edge-only decoding has at most `forced`
        tokens, which the grammar forces. Raises `DraftFault` if the first draft starts from other tokens; it is
        dropped.
        """
        if (ready := self.ready) is None:
            return ()
        if ready.draft.write is not None:
            return (self._with_forced(ready, most=most, max_forced=forced),)
        return self._waiting.chain(base=self.committed, digest=self._digest, most=most)

    def wants_token_after(self, chain: Sequence[ReceivedDraft]) -> bool:
        """A bonus token is drawn after a chain that is accepted whole, unless another draft or the end follows."""
        length = sum(len(arrived.draft.tokens) for arrived in chain)
        return not chain[-1].draft.more and self.committed + length < self.limits.max_new_tokens

    def awaits(self, chain: Sequence[ReceivedDraft]) -> bool:
        """The result for a chain may be outdated by what has arrived since.

        The generation may have ended, and drafts and requests for edge-only decoding replace each other. But a token of
        edge-only decoding is the same for any request.
        """
        ready, first = self._next_draft, chain[0]
        if ready is None:
            return False
        if first.draft.write is not None:
            return ready.draft.write is not None and ready.draft.base == first.draft.base
        return all(self._waiting.at(arrived.draft.base) is arrived for arrived in chain)

    def settle(self, chain: Sequence[ReceivedDraft], judgement: Judgement) -> list[DraftResult]:
        """Commit what a judgement on the chain accepts; return a result for each draft decided on."""
        if chain[0].draft.write is not None:
            return [self._settle_decoded(chain[0], judgement)]
        settled = split_judgement(chain, judgement, limits=self.limits, committed=self.committed)
        for part in settled:
            self._waiting.remove(part.arrived)
            self._extend(part.tokens)
            self.token_logprobs.extend(part.logprobs[: len(part.tokens)])
            self.counters.tokens += len(part.tokens)
            self.counters.tested += part.tested
            self.counters.accepted += part.accepted
            self.recent.count(tested=part.tested, accepted=part.accepted)
            if part.rejected:
                self._reject(part)
            if part.finish is not Finish.NO:
                self._move(EdgeSessionEvent.ENDED)
        self.counters.forced += len(judgement.forced)
        return settled

    # Edge-only decoding

    @property
    def finish(self) -> Finish:
        if not self.committed:
            return Finish.NO
        return self.limits.finish(self.tokens[-1:], committed=self.committed)

    def _with_forced(self, ready: ReceivedDraft, *, most: int, max_forced: int) -> ReceivedDraft:
        """Add what the grammar forces to a draft of edge-only decoding: it costs less here than in steps of its own."""
        if self.constraint is None:
            return ready
        assert self.decode is not None
        # The token after the forced ones is wanted too.
        room = max(0, min(most, self.decode.until - self.committed) - 1)
        forced = self.constraint.next_forced(self.text, min(room, max_forced))
        tokens = tuple(takewhile(lambda token: token not in self.limits.end_tokens, forced))
        return replace(ready, draft=ready.draft.model_copy(update={"tokens": tokens})) if tokens else ready

    def _settle_decoded(self, arrived: ReceivedDraft, judgement: Judgement) -> DraftResult:
        """Commit what edge-only decoding has generated, as far as the device still asks for it."""
        assert self.decode is not None
        result = self.decode.result(arrived, judgement, limits=self.limits, committed=self.committed)
        written = len(result.tokens)
        self._extend(result.tokens)
        self.token_logprobs.extend(result.logprobs)
        counters = self.counters
        counters.tokens += written
        counters.edge_only += written
        counters.speculated += len(arrived.draft.tokens)
        counters.speculated_accepted += result.accepted
        counters.forced += sum(place < written for place in judgement.forced)
        if result.finish is not Finish.NO:
            self._move(EdgeSessionEvent.ENDED)
        return result

    def take_unsent(self, decode: DecodeRequest, *, at: float, most: int = MAX_TOKENS) -> tuple[int, ...]:
        """Return at most `most` tokens that were not sent yet and mark them as sent at `at` (monotonic seconds)."""
        begin, decode.sent_at = decode.sent, at
        decode.sent = min(self.committed, begin + most)
        self.sent = max(self.sent, decode.sent)
        self._rounds.mark_answered(decode.request.round)
        return tuple(self.tokens[self.prompt_length + begin : self.prompt_length + decode.sent])

    def logprobs_from(self, position: int, number: int) -> tuple[TokenLogprobs, ...]:
        if self.logprobs is None:
            return ()
        first = len(self.token_logprobs) - (self.committed - position)
        return tuple(self.token_logprobs[first : first + number])

    def close(self, message: Close) -> None:
        """Commit the device's last correction if no draft carried it, and end."""
        if message.fix is not None and self._may_follow(message.fix) and message.tokens == self.committed + 1:
            self._correct(message.fix)
        self._move(EdgeSessionEvent.ENDED)

    def fail(self, fault: DraftFault) -> None:
        self.failure = fault
        self._move(EdgeSessionEvent.FAILED)

    # Internal

    def _check_place(self, draft: Draft) -> None:
        """Check that a draft starts at the committed position or behind it, within the window."""
        if draft.fix is not None or draft.base == self.committed:
            self._check_prefix(draft)
        elif draft.base < self.committed:
            raise tokens_differ(f"The draft starts at {draft.base} tokens, the edge has {self.committed}.")
        if self._waiting.at(draft.base) is None and len(self._waiting) >= self.limits.window:
            raise DraftFault(FaultCode.TOO_LONG, Action.RESUME, f"More than {self.limits.window} drafts are in flight.")

    def _check_prefix(self, draft: Draft) -> None:
        """Compare position and digest, including a correction."""
        new = () if draft.fix is None else (draft.fix,)
        if new and self.rejection is None:
            raise tokens_differ("The draft corrects a position that was not rejected.")
        if draft.base != self.committed + len(new) or draft.digest != extend_digest(self._digest, new):
            raise tokens_differ("The draft starts from other tokens than the edge has.")
        if self.rejection is not None and draft.fix is None:
            raise tokens_differ("The draft lacks the correction of the rejected position.")
        if draft.fix is not None and not self._may_follow(draft.fix):
            raise tokens_differ("The correction is a token that the edge has not offered.")

    def _may_follow(self, fix: int) -> bool:
        """A device can draw only tokens that are possible in p in place of the rejected one."""
        return self.rejection is not None and self.rejection.p.probability(fix) > 0.0

    def _correct(self, fix: int | None) -> None:
        """Commit the device's correction of the rejected position."""
        rejection = self.rejection
        if fix is None or rejection is None:
            return
        self.rejection = None
        self._move(EdgeSessionEvent.CORRECTED)
        self._extend((fix,))
        # The device's own correction: it already has these log-probabilities.
        self.token_logprobs.extend(rejection.logprobs)
        self.counters.tokens += 1

    def _admit_request(self, draft: Draft) -> DraftReceipt:
        rejection = self.rejection
        if rejection is None or draft.base != self.committed:
            raise tokens_differ("Samples are requested, but nothing was rejected.")
        rejection.requests += 1
        if rejection.requests > _SAMPLE_REQUESTS:
            raise DraftFault(
                FaultCode.QUOTA,
                Action.GIVE_UP,
                f"Samples were requested more than {_SAMPLE_REQUESTS} times after one rejection.",
            )
        return DraftReceipt(request=True)

    def _admit_decode(self, draft: Draft, write: int, arrived: ReceivedDraft) -> DraftReceipt:
        decode = self.decode
        latest = decode.request.round if decode is not None else -1
        if draft.epoch < self._epoch or draft.round < max(latest, self._waiting.latest):
            return DraftReceipt()  # delivered late: the device has moved on
        if draft.round != latest and self._rounds.passed(draft.round):
            return DraftReceipt()
        if draft.epoch > self._epoch:
            raise tokens_differ("The request's epoch is ahead of the edge's.")
        if self.rejection is not None:
            self._check_prefix(draft)
            self._correct(draft.fix)
        elif draft.base > self.committed or draft.digest != self._digest_at(draft.base):
            raise tokens_differ("The request for edge-only decoding starts from other tokens than the edge has.")
        self._move(EdgeSessionEvent.DECODING_REQUESTED)
        self._waiting.void()
        until = min(draft.base + write, self.limits.max_new_tokens)
        self.sent = max(self.sent, draft.base)
        sent_at = -math.inf if decode is None else decode.sent_at
        self.decode = DecodeRequest(
            draft, until=until, sent=draft.base, due_at=arrived.at, sent_at=sent_at, size=arrived.size
        )
        # Otherwise missing tokens are sent with the next ones.
        return DraftReceipt(written=self.finished or self.committed >= until)

    def _digest_at(self, position: int) -> int:
        if position == self.committed:
            return self._digest
        return extend_digest(EMPTY_DIGEST, self.tokens[self.prompt_length : self.prompt_length + position])

    def _extend(self, tokens: Sequence[int]) -> None:
        self.tokens.extend(tokens)
        self._digest = extend_digest(self._digest, tokens)

    def _move(self, event: EdgeSessionEvent) -> None:
        self.state = next_state(self.state, event)

    def _reject(self, part: DraftResult) -> None:
        self._epoch += 1
        self._waiting.void()
        if part.p is not None:  # otherwise the edge has drawn the correction
            self._move(EdgeSessionEvent.REJECTED)
            self.rejection = PendingCorrection(part.p, part.logprobs[len(part.tokens) :])
