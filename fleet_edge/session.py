"""One session at the edge, without I/O and without a clock: it admits drafts, takes judgements and remembers verdicts.

Invariant: `tokens` is prompt and committed text. Drafts wait in `_waiting` by the position they stand on, so that one
that overtook its predecessor, or was sent ahead of a verdict, waits for its turn; `chain` is what can be verified now.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from dssd.distribution import Dist
from dssd.judgement import Judgement
from fleet_edge.counters import Counters
from fleet_edge.errors import DraftFault
from fleet_edge.limits import Limits
from schemas.digest import EMPTY, extend_digest
from schemas.messages import Action, Close, Draft, FaultCode, Finish, Open
from schemas.policy import Mode, SamplingPolicy

__all__ = ["Admission", "Arrived", "EdgeSession", "Settled"]

# A repeat comes within a few round trips; twice the window of unanswered drafts covers it.
_REMEMBERED_PER_WINDOW: Final = 2


@dataclass(frozen=True, slots=True)
class Arrived:
    """A draft with the moment of its arrival (monotonic seconds)."""

    draft: Draft
    at: float
    size: int = 0


@dataclass(frozen=True, slots=True)
class Admission:
    """What became of a draft on arrival.

    Attributes:
        repeat: The verdict's bytes, if it was answered before.
        queued: Whether it now waits to be verified.
        request: Whether it asks for samples of the last rejection, to be answered from memory.
    """

    repeat: bytes | None = None
    queued: bool = False
    request: bool = False


@dataclass(frozen=True, slots=True)
class Settled:
    """One draft's part of a judgement.

    Attributes:
        arrived: The draft.
        accepted: Length of its accepted head.
        tested: Of its tokens, those decided on.
        token: The token after the head, drawn by the edge.
        p: Or the distribution at the rejection.
        finish: Whether the text ends.
    """

    arrived: Arrived
    accepted: int
    tested: int
    token: int | None
    p: Dist | None
    finish: Finish


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
    """

    handle: int
    session: bytes
    attempt: int
    device: str
    policy: SamplingPolicy
    limits: Limits
    tokens: list[int]
    prompt_length: int
    counters: Counters = field(default_factory=Counters)
    finished: bool = False
    _epoch: int = 0
    _digest: int = EMPTY
    _rejected: Dist | None = None
    _awaiting_fix: bool = False
    _last_round: int = -1
    _failure: DraftFault | None = None
    _counted: OrderedDict[int, None] = field(default_factory=OrderedDict)
    _waiting: dict[int, Arrived] = field(default_factory=dict)
    _verdicts: OrderedDict[int, bytes] = field(default_factory=OrderedDict)

    @classmethod
    def from_open(cls, message: Open, *, handle: int, device: str, limits: Limits) -> "EdgeSession":
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
            _digest=extend_digest(EMPTY, resumed),
        )

    @property
    def committed(self) -> int:
        """Length of the text."""
        return len(self.tokens) - self.prompt_length

    @property
    def rejected(self) -> Dist | None:
        """The target's distribution at the last rejection, while its correction is awaited."""
        return self._rejected

    # Arrival

    def admit(self, arrived: Arrived) -> Admission:
        """Check a draft and queue it.

        Raises:
            DraftFault: It cannot be judged; nothing has changed.
        """
        draft = arrived.draft
        if draft.round in self._verdicts:
            return Admission(repeat=self._verdicts[draft.round])
        if (failure := self._failure) is not None:
            raise DraftFault(failure.code, failure.action, str(failure))
        self._check_contents(draft)
        self._count_drafted(draft)
        if self._is_void(draft):
            return Admission()
        if draft.epoch > self._epoch:
            raise _desync("The draft's epoch is ahead of the edge's.")
        if draft.tried is not None:
            return self._admit_request(draft)
        if draft.fix is not None or draft.base == self.committed:
            self._check_prefix(draft)
        elif draft.base < self.committed:
            raise _desync(f"The draft stands on {draft.base} tokens, the edge has {self.committed}.")
        if draft.base not in self._waiting and len(self._waiting) >= self.limits.window:
            raise DraftFault(
                FaultCode.TOO_LONG, Action.RESUME, f"More than {self.limits.window} drafts are under way at once."
            )
        if draft.fix is not None:
            self._commit((draft.fix,))
            self._awaiting_fix, self._rejected = False, None
        self._waiting.setdefault(draft.base, arrived)
        return Admission(queued=True)

    def remember(self, round_: int, payload: bytes) -> None:
        """Keep a verdict's bytes for repeats."""
        self._verdicts[round_] = payload
        while len(self._verdicts) > _REMEMBERED_PER_WINDOW * self.limits.window:
            self._verdicts.popitem(last=False)
        self._last_round = max(self._last_round, round_)

    # Verification

    @property
    def ready(self) -> Arrived | None:
        """The draft that stands on the committed text, if it is there."""
        return None if self.finished or self._awaiting_fix else self._waiting.get(self.committed)

    def chain(self, most: int) -> tuple[Arrived, ...]:
        """Return the drafts that can be verified in one go, each standing on the one before.

        Args:
            most: Most tokens in all; the first draft always comes, however long.

        Raises:
            DraftFault: The first draft came early, and turns out to stand on another text; it is forgotten.
        """
        chain: list[Arrived] = []
        base, digest = self.committed, self._digest
        while (arrived := self.ready if not chain else self._waiting.get(base)) is not None:
            draft = arrived.draft
            if draft.digest != digest:
                if chain:
                    break
                del self._waiting[base]
                raise _desync("The draft stands on another text than the edge's.")
            if chain and base + len(draft.tokens) - self.committed > most:
                break
            chain.append(arrived)
            base += len(draft.tokens)
            digest = extend_digest(digest, draft.tokens)
            if not draft.more or not draft.tokens:
                break
        return tuple(chain)

    def wants_token_after(self, chain: Sequence[Arrived]) -> bool:
        """Whether a bonus token is due once the whole chain is accepted."""
        length = sum(len(arrived.draft.tokens) for arrived in chain)
        return not chain[-1].draft.more and self.committed + length < self.limits.max_new_tokens

    def settle(self, chain: Sequence[Arrived], judgement: Judgement) -> list[Settled]:
        """Commit what a judgement on the chain accepts.

        Returns:
            A verdict's content for each draft that was decided on; drafts behind a rejection are void.
        """
        settled = []
        left = judgement.accepted
        for place, arrived in enumerate(chain):
            draft = arrived.draft
            del self._waiting[draft.base]
            taken = min(left, len(draft.tokens))
            left -= taken
            self._commit(draft.tokens[:taken])
            stopped = self._ends(draft.tokens[:taken])
            rejected_here = taken < len(draft.tokens)
            decided = rejected_here or place == len(chain) - 1
            token = judgement.token if decided and not stopped else None
            if token is not None:
                self._commit((token,))
                stopped = token in self.limits.end_tokens
            p = judgement.p if rejected_here else None
            finish = self._finish(stopped=stopped)
            tested = taken + rejected_here
            self._count(accepted=taken, tested=tested)
            settled.append(Settled(arrived, taken, tested, token, p, finish))
            if rejected_here:
                self._reject(p)
            if rejected_here or finish is not Finish.NO:
                break
        return settled

    def close(self, message: Close) -> None:
        """Take the device's last correction, if no draft carried it, and end."""
        fix, p = message.fix, self._rejected
        if fix is not None and p is not None and message.tokens == self.committed + 1 and p.probability(fix) > 0.0:
            self._commit((fix,))
        self.finished = True
        self._waiting.clear()

    def fail(self, fault: DraftFault) -> None:
        """End without a text; whatever else is drafted is answered with the same fault."""
        self._failure, self.finished = fault, True
        self._waiting.clear()

    # Within

    def _is_void(self, draft: Draft) -> bool:
        """Whether nobody waits for an answer: it had one long ago, a rejection voided it, or it was delivered twice."""
        if self.finished or draft.round <= self._last_round or draft.epoch < self._epoch:
            return True
        return any(waiting.draft.round == draft.round for waiting in self._waiting.values())

    def _check_contents(self, draft: Draft) -> None:
        limits = self.limits
        end = draft.base + len(draft.tokens)
        if len(draft.tokens) > limits.max_draft:
            raise DraftFault(
                FaultCode.TOO_LONG,
                Action.GIVE_UP,
                f"The draft has {len(draft.tokens)} tokens; at most {limits.max_draft} were agreed.",
            )
        if end > limits.max_new_tokens:
            raise DraftFault(
                FaultCode.TOO_LONG,
                Action.GIVE_UP,
                f"The draft ends at token {end}; the text has at most {limits.max_new_tokens}.",
            )
        if any(token in limits.end_tokens for token in draft.tokens[:-1]):
            raise DraftFault(FaultCode.TOKEN, Action.GIVE_UP, "The draft goes on behind an end-of-sequence token.")
        ids = (*draft.tokens, draft.fix) if draft.fix is not None else draft.tokens
        if any(token >= limits.vocabulary for token in ids):
            raise DraftFault(
                FaultCode.TOKEN,
                Action.GIVE_UP,
                f"The draft holds a token id outside the vocabulary of {limits.vocabulary}.",
            )
        if (self.policy.mode is Mode.RESIDUAL and draft.tried is None) != (draft.counts is not None):
            raise DraftFault(
                FaultCode.COUNTS,
                Action.GIVE_UP,
                "A draft has one count for each token in residual mode, and none in coupled mode.",
            )

    def _check_prefix(self, draft: Draft) -> None:
        """Compare position and digest, the correction counted in."""
        fixes = () if draft.fix is None else (draft.fix,)
        if fixes and not self._awaiting_fix:
            raise _desync("The draft corrects a position that was not rejected.")
        if draft.base != self.committed + len(fixes) or draft.digest != extend_digest(self._digest, fixes):
            raise _desync("The draft stands on another text than the edge's.")
        if self._awaiting_fix and not fixes:
            raise _desync("The draft lacks the correction of the rejected position.")
        if fixes and self._rejected is not None and self._rejected.probability(fixes[0]) == 0.0:
            raise _desync("The correction is a token that the target model rules out.")

    def _admit_request(self, draft: Draft) -> Admission:
        if not self._awaiting_fix or self._rejected is None or draft.base != self.committed:
            raise _desync("Samples are asked for, but nothing was rejected.")
        return Admission(request=True)

    def _commit(self, tokens: Sequence[int]) -> None:
        self.tokens.extend(tokens)
        self._digest = extend_digest(self._digest, tokens)

    def _ends(self, tokens: Sequence[int]) -> bool:
        return bool(tokens) and tokens[-1] in self.limits.end_tokens

    def _finish(self, *, stopped: bool) -> Finish:
        if stopped:
            finish = Finish.STOP
        elif self.committed >= self.limits.max_new_tokens:
            finish = Finish.LENGTH
        else:
            return Finish.NO
        self.finished = True
        self._waiting.clear()
        return finish

    def _reject(self, p: Dist | None) -> None:
        self._epoch += 1
        self._waiting.clear()
        self._rejected = p
        self._awaiting_fix = p is not None

    def _count_drafted(self, draft: Draft) -> None:
        """Count a draft's tokens once, whether it is judged or void, and in whatever order drafts arrive."""
        full = len(self._counted) >= _REMEMBERED_PER_WINDOW * self.limits.window
        if draft.round in self._counted or (full and draft.round < next(iter(self._counted))):
            return
        self._counted[draft.round] = None
        self.counters.drafted += len(draft.tokens)
        if full:
            self._counted.popitem(last=False)

    def _count(self, *, accepted: int, tested: int) -> None:
        self.counters.rounds += 1
        self.counters.accepted += accepted
        self.counters.tested += tested


def _desync(sentence: str) -> DraftFault:
    return DraftFault(FaultCode.DESYNC, Action.RESUME, sentence + " The device resumes with its whole text.")
