"""One session on the device, without I/O and without a clock: feed it proposals and verdicts, it says what to send.

Invariant: the text is `committed`; behind it stand, in order, the drafts under way (`in_flight`) and the draft being
built (`building`). A rejection voids all that stands behind the committed text and begins a new epoch, at both ends.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from dssd.distribution import Dist
from dssd.downlink import correct
from dssd.proposal import Proposal, propose
from fleet_device.counters import Counters
from fleet_device.errors import ProtocolViolation
from fleet_device.terms import Terms
from schemas.digest import EMPTY, extend_digest
from schemas.downlink import DownlinkForm, Samples, UnknownForm
from schemas.messages import (
    MAX_LABEL,
    Close,
    Closed,
    Draft,
    EndReason,
    Finish,
    Open,
    Opened,
    Verdict,
)
from schemas.policy import Mode

__all__ = ["DeviceSession", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """What a verdict has done.

    Attributes:
        tokens: Newly committed.
        valid: Length of the text that the drafter proposed itself and that still stands.
        correction: The token behind it that the drafter has not seen, drawn by the edge or in its name: the drafter's
            sequence is to be cut to `valid` and to go on with it. None where the drafter has nothing to learn.
        request: A further draft message to send at once: more samples are needed.
    """

    tokens: tuple[int, ...] = ()
    valid: int = 0
    correction: int | None = None
    request: Draft | None = None


@dataclass(frozen=True, slots=True)
class _Sent:
    draft: Draft
    proposals: tuple[Proposal, ...]


@dataclass(slots=True)
class _Rejection:
    """A rejected position whose correction is not drawn yet: `tried` samples have failed so far."""

    proposal: Proposal
    position: int
    tried: int = 0


@dataclass(slots=True)
class DeviceSession:
    """The state machine."""

    terms: Terms
    committed: list[int] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    ended: EndReason | None = None
    opened: Opened | None = None
    _attempt: int = -1
    _epoch: int = 0
    _round: int = 0
    _digest: int = EMPTY
    _fix: int | None = None
    _rejection: _Rejection | None = None
    _in_flight: deque[_Sent] = field(default_factory=deque)
    _building: list[Proposal] = field(default_factory=list)
    _early: dict[int, Verdict] = field(default_factory=dict)

    # Opening and resuming

    @property
    def asked(self) -> bool:
        """Whether an Open was made, so that some edge may have the session."""
        return self._attempt >= 0

    def open(self) -> Open:
        """Return the Open to send, first or again; whatever was under way is void."""
        self._attempt += 1
        self.opened = None
        self._void()
        self._fix = self._rejection = None
        return Open(
            session=self.terms.session,
            attempt=self._attempt,
            vocabulary=self.terms.vocabulary,
            draft_model=self.terms.draft_model[:MAX_LABEL],
            quantization=self.terms.quantization[:MAX_LABEL],
            policy=self.terms.policy,
            prompt=self.terms.prompt,
            max_new_tokens=self.terms.max_new_tokens,
            resume=tuple(self.committed) if self._attempt else None,
        )

    def on_opened(self, opened: Opened) -> bool:
        """Take the edge's terms.

        Returns:
            False if it answers an older Open and means nothing.

        Raises:
            ProtocolViolation: It does not continue our text.
        """
        if opened.session != self.terms.session or opened.attempt != self._attempt or self.opened is not None:
            return False
        if opened.position != len(self.committed):
            raise ProtocolViolation(
                f"The edge resumes at token {opened.position}, the device has {len(self.committed)}."
            )
        self.opened = opened
        self._epoch = 0
        return True

    def concerns(self, closed: Closed) -> bool:
        """Whether an edge's last word is about the session as it stands, not about a part resumed elsewhere since."""
        if closed.session != self.terms.session:
            return False
        return closed.attempt is None or self.opened is None or closed.attempt == self.opened.attempt

    # Drafting

    @property
    def position(self) -> int:
        """Position of the next token to draft: behind all that is committed, under way or being built."""
        return len(self.committed) + self._ahead + len(self._building)

    def room(self, limit: int) -> int:
        """Return how many more tokens the draft being built may take.

        Args:
            limit: Draft length that the caller wants; the edge's own limit and the end of the text bound it.
        """
        if self.opened is None or self._rejection is not None or not self.may_send:
            return 0
        if self._last_drafted in self.opened.end_tokens:
            return 0
        longest = min(limit, self.opened.max_draft) - len(self._building)
        return max(0, min(longest, self.opened.max_new_tokens - self.position))

    @property
    def may_send(self) -> bool:
        """Whether a draft may be sent now: the first of its epoch, or one that was promised."""
        if self.opened is None or self.ended is not None or self._rejection is not None:
            return False
        return not self._in_flight or self._in_flight[-1].draft.more

    @property
    def may_promise(self) -> bool:
        """Whether the draft being built may announce another: the window and the text have room for it."""
        if self.opened is None or not self._building or self._last_drafted in self.opened.end_tokens:
            return False
        return len(self._in_flight) + 1 < self.opened.window and self.position < self.opened.max_new_tokens

    def propose(self, q: Dist) -> int:
        """Draw the next draft token from the drafter's distribution and return it."""
        proposal = propose(q, policy=self.terms.policy, position=self.position)
        self._building.append(proposal)
        return proposal.token

    def send(self, *, more: bool = False) -> Draft:
        """Close the draft being built and return the message.

        Args:
            more: Promise another draft without waiting for the verdict; needs `may_promise`.
        """
        proposals, self._building = tuple(self._building), []
        tail = [token for sent in self._in_flight for token in sent.draft.tokens]
        residual = self.terms.policy.mode is Mode.RESIDUAL
        draft = self._message(
            base=len(self.committed) + len(tail),
            digest=extend_digest(self._digest, tail),
            fix=self._fix,
            tokens=tuple(proposal.token for proposal in proposals),
            counts=tuple(p.count for p in proposals if p.count is not None) if residual else None,
            more=more,
        )
        self._fix = None
        self._in_flight.append(_Sent(draft, proposals))
        self.counters.drafted += len(proposals)
        return draft

    def unanswered(self) -> tuple[Draft, ...]:
        """Return the drafts under way, to be repeated when no verdict came."""
        return tuple(sent.draft for sent in self._in_flight)

    # Verdicts

    def on_verdict(self, verdict: Verdict) -> list[Step]:
        """Take a verdict; several take effect at once if they came out of order.

        Raises:
            ProtocolViolation: It is no answer to what was asked.
        """
        opened = self.opened
        if opened is None or verdict.handle != opened.handle or self.ended is not None:
            return []
        if all(verdict.round != sent.draft.round for sent in self._in_flight):
            return []  # a repeat, or a verdict on what is void
        self._early[verdict.round] = verdict
        steps = []
        while self._in_flight and (found := self._early.pop(self._in_flight[0].draft.round, None)):
            steps.append(self._judge(found, self._in_flight.popleft()))
            if self.ended is not None:
                break
        return steps

    def cancel(self, reason: EndReason) -> None:
        """End the session from this side."""
        if self.ended is None:
            self.ended = reason
            self._void()

    def close(self, *, wall_ms: float) -> Close:
        """Return the Close to send once `ended` is set.

        Args:
            wall_ms: Time since the first Open.
        """
        if self.ended is None:
            raise ValueError("the session has not ended")
        counters = self.counters
        return Close(
            session=self.terms.session,
            handle=self.opened.handle if self.opened else None,
            edge=self.opened.edge if self.opened else None,
            reason=self.ended,
            tokens=len(self.committed),
            fix=self._fix,
            digest=self._digest,
            drafted=counters.drafted,
            tested=counters.tested,
            accepted=counters.accepted,
            rounds=counters.rounds,
            uplink_bytes=counters.uplink_bytes,
            downlink_bytes=counters.downlink_bytes,
            draft_ms=counters.draft_ms,
            wait_ms=counters.wait_ms,
            wall_ms=wall_ms,
        )

    # Within

    @property
    def _ahead(self) -> int:
        return sum(len(sent.draft.tokens) for sent in self._in_flight)

    @property
    def _last_drafted(self) -> int | None:
        if self._building:
            return self._building[-1].token
        for sent in reversed(self._in_flight):
            if sent.draft.tokens:
                return sent.draft.tokens[-1]
        return None

    def _message(self, *, base: int, digest: int, **fields: object) -> Draft:
        assert self.opened is not None
        draft = Draft.model_validate(
            {
                "handle": self.opened.handle,
                "round": self._round,
                "epoch": self._epoch,
                "base": base,
                "digest": digest,
                **fields,
            }
        )
        self._round += 1
        return draft

    def _judge(self, verdict: Verdict, sent: _Sent) -> Step:
        draft = sent.draft
        self.counters.rounds += 1
        if draft.tried is not None:
            return self._settle_rejection(verdict)
        if verdict.accepted > len(draft.tokens):
            raise ProtocolViolation(f"The edge accepted {verdict.accepted} of {len(draft.tokens)} tokens.")
        head = draft.tokens[: verdict.accepted]
        self._commit(head)
        self.counters.accepted += len(head)
        self.counters.tested += len(head)
        valid = len(self.committed)
        if verdict.accepted < len(draft.tokens):
            self.counters.tested += 1
            step = self._rejected(verdict, sent.proposals[verdict.accepted])
            return Step(head + step.tokens, valid, step.correction, step.request)
        bonus: tuple[int, ...] = ()
        if isinstance(verdict.next, int):
            if draft.more:
                raise ProtocolViolation("The edge drew a token that the next draft already stands on.")
            bonus = (verdict.next,)
            self._commit(bonus)
        elif verdict.next is not None:
            raise ProtocolViolation("The edge sent a distribution although nothing was rejected.")
        elif verdict.finish is Finish.NO and not draft.more:
            raise ProtocolViolation("The edge accepted a draft and drew no token after it.")
        self._finish(verdict.finish)
        return Step(head + bonus, valid, bonus[0] if bonus else None)

    def _rejected(self, verdict: Verdict, proposal: Proposal) -> Step:
        self._void()
        self._epoch += 1
        self._rejection = _Rejection(proposal, len(self.committed))
        return self._settle_rejection(verdict)

    def _settle_rejection(self, verdict: Verdict) -> Step:
        """Draw the correction, or ask for more samples."""
        rejection = self._rejection
        if rejection is None or verdict.next is None:
            raise ProtocolViolation("The edge rejected a token and sent nothing to correct it with.")
        valid = len(self.committed)
        token = self._correction(verdict.next, rejection)
        if token is None:
            request = self._message(base=valid, digest=self._digest, tried=rejection.tried)
            self._in_flight.append(_Sent(request, ()))
            return Step((), valid, None, request)
        self._rejection = None
        self._commit((token,))
        self._finish(verdict.finish)
        return Step((token,), valid, token)

    def _correction(self, following: int | DownlinkForm | UnknownForm, rejection: _Rejection) -> int | None:
        """Return the token that takes the rejected one's place, or None if more samples are needed."""
        if isinstance(following, UnknownForm):
            raise ProtocolViolation(
                f"The edge sent the target distribution in form {following.number}, which this device does not know; "
                "update the device, or have the edge use another form."
            )
        lattice = rejection.proposal.lattice
        if lattice is None:
            if not isinstance(following, int):
                raise ProtocolViolation("In coupled mode a correction is a token.")
            return following
        if isinstance(following, int):
            raise ProtocolViolation("In residual mode a correction is drawn by the device.")
        if isinstance(following, Samples) and following.start != rejection.tried:
            # Each index is one draw: to look at some again, or to skip some, would bend the law.
            raise ProtocolViolation(
                f"The edge sent samples from {following.start} on, the device has tried {rejection.tried}."
            )
        token = correct(following, lattice, policy=self.terms.policy, position=rejection.position)
        if token is None:
            assert isinstance(following, Samples)
            rejection.tried += len(following.ids)
        else:
            self._fix = token
        return token

    def _commit(self, tokens: Sequence[int]) -> None:
        size = self.terms.vocabulary.size
        if any(token >= size for token in tokens):
            raise ProtocolViolation("The edge sent a token outside the vocabulary.")
        self.committed.extend(tokens)
        self._digest = extend_digest(self._digest, tokens)

    def _finish(self, finish: Finish) -> None:
        """End the text if the edge says so, or if the device's own correction ends it."""
        assert self.opened is not None
        if finish is Finish.STOP or (self.committed and self.committed[-1] in self.opened.end_tokens):
            self.cancel(EndReason.STOP)
        elif finish is Finish.LENGTH or len(self.committed) >= self.opened.max_new_tokens:
            self.cancel(EndReason.LENGTH)

    def _void(self) -> None:
        self._in_flight.clear()
        self._building.clear()
        self._early.clear()
