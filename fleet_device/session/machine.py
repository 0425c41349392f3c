"""Device session: the protocol's state machine, without I/O and without a clock.

Feed it proposals and verdicts, it says what to send. Its states are those of `fleet_device.session.states`. Invariant:
the text is `committed`; behind it stand the drafts in flight. A rejection voids them and begins a new epoch, at both
ends; until it is corrected nothing is drafted.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace

from dssd.distribution import Dist, point_mass
from dssd.downlink import probability_of
from dssd.logprobs import logprobs_of_correction
from dssd.sampling import propose
from fleet_device.errors import ProtocolViolation, SessionRefused
from fleet_device.session.in_flight import DecidedDraft, DraftsInFlight, Rejection, Streaming, VerdictEffect
from fleet_device.session.states import SessionCounters, SessionEvent, SessionState, next_state
from fleet_device.session.text import SessionRequest, Text, TextBounds
from schemas.bounds import MAX_WINDOW
from schemas.logprobs import TokenLogprobs
from schemas.messages import Close, Closed, Draft, Open, Opened, Verdict
from schemas.policy import Mode
from schemas.reasons import EndReason, Finish, RefusalCode


@dataclass(slots=True)
class DeviceSession:
    """The state machine.

    Attributes:
        request: What the device asks for.
        counters: What the device counts; times are the caller's to add.
        ended: How the text has ended, or None.
        opened: The edge's grant, while there is one.
        state: Where the session stands.
        granted: Whether any edge has taken the session so far.
        window: Most drafts under way at once, whatever the edge grants.
        revisable: Whether tokens that no edge has verified are replaced once an edge has the session again; otherwise
            they stand, and the text goes on behind them.
        text: What is committed.
    """

    request: SessionRequest
    window: int = MAX_WINDOW
    revisable: bool = False
    text: Text = field(init=False)
    counters: SessionCounters = field(default_factory=SessionCounters)
    ended: EndReason | None = None
    opened: Opened | None = None
    state: SessionState = SessionState.NEW
    granted: bool = False
    _attempt: int = -1
    _asking: Open | None = None  # the last Open, until an edge has answered it or the text has changed
    _epoch: int = 0
    _round: int = 0
    _fix: int | None = None
    _first: bool = True  # no draft was sent since the session was opened
    _heard: bool = False  # a verdict has come since
    _drafts: DraftsInFlight = field(default_factory=DraftsInFlight)
    _rejection: Rejection | None = None
    _streaming: Streaming | None = None

    def __post_init__(self) -> None:
        """Take the text's bounds from the request, until an edge names them."""
        self.text = Text(self.request.vocabulary.size, TextBounds(self.request.max_new_tokens))

    @property
    def committed(self) -> list[int]:
        return self.text.tokens

    # Opening and resuming

    @property
    def asked(self) -> bool:
        """Whether an Open was made, so that some edge may have the session."""
        return self._attempt >= 0

    def open(self) -> Open:
        """Return the Open to send, first or again; whatever was under way is void, and so are answers to older ones."""
        self._move(SessionEvent.OPEN)
        self._attempt += 1
        self._let_go()
        text = self.committed[: self.text.verified] if self.revisable else self.committed
        self._asking = self.request.open(attempt=self._attempt, text=text)
        return self._asking

    def open_again(self) -> Open:
        """Return the Open to send because no answer has come.

        It is the last one, if that may still be answered: a line may be slower than the repetition, and then the first
        answer is as good as any. The edge that has taken it begins nothing anew for another.
        """
        if self._asking is None:
            return self.open()
        self._move(SessionEvent.OPEN)
        return self._asking

    def on_opened(self, opened: Opened) -> bool:
        """Take the edge's grant.

        Returns:
            False if it answers an older Open, or one that was answered before, and means nothing.

        Raises:
            ProtocolViolation: It does not continue our text, or is for more than was asked.
        """
        asking = self._asking
        if asking is None or (opened.session, opened.attempt) != (asking.session, asking.attempt):
            return False
        position = len(asking.resume or ())
        if opened.position != position:
            raise ProtocolViolation(f"The edge resumes at token {opened.position}, the device has {position}.")
        if opened.max_new_tokens > self.request.max_new_tokens:
            raise ProtocolViolation(
                f"The edge grants {opened.max_new_tokens} tokens; {self.request.max_new_tokens} were asked for."
            )
        self._move(SessionEvent.GRANTED)
        self.opened, self.granted, self._asking = opened, True, None
        self.text.bounds = TextBounds(opened.max_new_tokens, opened.end_tokens)
        if position < len(self.committed):
            self.text.revise(position)
        self._epoch, self._first = 0, True
        self._heard = False
        if self.request.logprobs is not None and opened.logprobs is None:
            raise SessionRefused(
                RefusalCode.LOGPROBS,
                f"Edge {opened.edge!r} tells no log-probabilities; update it, or ask without `logprobs`.",
            )
        return True

    def on_undelivered(self) -> None:
        """Note that the Open reached nobody: no edge is subscribed."""
        if self.opened is None and self.ended is None:
            self._move(SessionEvent.UNDELIVERED)

    def on_postponed(self) -> None:
        """Note that an edge refused the Open for a reason that passes."""
        if self.opened is None and self.ended is None:
            self._move(SessionEvent.POSTPONED)

    def suspend(self) -> None:
        """Let go of the grant: the session is opened again later, and whatever was under way is void."""
        self._move(SessionEvent.POSTPONED)
        self._let_go()

    def concerns(self, closed: Closed) -> bool:
        """Whether an edge's last word is about the session as it stands.

        It is not if it is about a part resumed elsewhere since. Nor is it if it comes from an edge that has judged
        nothing while ours has: a repeated Open may reach a second edge, which gives the session up when no draft comes.
        """
        if closed.session != self.request.session:
            return False
        if closed.attempt is None or self.opened is None:
            return True
        return closed.attempt == self.opened.attempt and (closed.rounds > 0 or not self._heard)

    # Without an edge

    @property
    def local(self) -> bool:
        """Whether the draft model writes alone."""
        return self.state is SessionState.LOCAL

    def go_local(self, end_tokens: Collection[int]) -> None:
        """Go on without an edge; whatever was under way is void.

        Args:
            end_tokens: Ids that end the text, if no edge has named them.
        """
        self._move(SessionEvent.WENT_LOCAL)
        self._let_go()
        self.text.go_on_alone(end_tokens)
        self._finish(Finish.NO)  # where nothing is left to be written

    def write_alone(self, q: Dist) -> int:
        """Draw the next token of the text from the draft model's distribution, and return it; no edge verifies it.

        It is drawn as a draft's token is: with the same random numbers, in coupled mode with the noise of both ends.
        """
        if not self.local:
            raise ValueError("an edge has the session")
        token = propose(q, policy=self.request.policy, position=len(self.committed)).token
        self.text.commit_unverified(token)
        self._finish(Finish.NO)
        return token

    # Drafting

    @property
    def position(self) -> int:
        """Position of the next token to draft: behind all that is committed, under way or being built."""
        return len(self.committed) + self._drafts.length

    @property
    def may_send(self) -> bool:
        """Whether a draft may be sent now: the first of its epoch, or one that the last draft has announced."""
        return self.state is SessionState.DRAFTING

    @property
    def may_draft_ahead(self) -> bool:
        """Whether the draft being built may announce another: the window and the text have room for it."""
        opened, drafts = self.opened, self._drafts
        if opened is None or not drafts.building or drafts.last_token in opened.end_tokens:
            return False
        window = min(opened.window, self.window)
        return len(drafts.drafts) + 1 < window and self.position < opened.max_new_tokens

    def room(self, limit: int) -> int:
        """Return how many more tokens the draft being built may take.

        Args:
            limit: Draft length that the caller wants; the edge's own limit and the end of the text bound it.
        """
        opened, drafts = self.opened, self._drafts
        if opened is None or not self.may_send or drafts.last_token in opened.end_tokens:
            return 0
        longest = min(limit, opened.max_draft) - len(drafts.building)
        return max(0, min(longest, opened.max_new_tokens - self.position))

    @property
    def chances(self) -> tuple[float, ...]:
        """Of the draft being built, the probabilities with which its tokens were drawn."""
        return tuple(proposal.chance for proposal in self._drafts.building)

    def propose(self, q: Dist) -> int:
        """Draw the next draft token from the drafter's distribution and return it."""
        proposal = propose(q, policy=self.request.policy, position=self.position)
        self._drafts.building.append(proposal)
        return proposal.token

    def propose_forced(self, token: int) -> None:
        """Take a token into the draft beside which a grammar allows no other: its probability is 1, whoever drafts."""
        proposal = propose(point_mass(token), policy=self.request.policy, position=self.position)
        self._drafts.building.append(replace(proposal, forced=True))

    @property
    def ahead(self) -> list[int]:
        """The text with all that is under way or being built behind it."""
        building = (proposal.token for proposal in self._drafts.building)
        return [*self.committed, *self._drafts.tokens, *building]

    @property
    def forced(self) -> int:
        """Of the draft being built, the tokens that a grammar has forced."""
        return sum(proposal.forced for proposal in self._drafts.building)

    def send(self, *, more: bool = False, at: float = 0.0, draft_s: float = 0.0) -> Draft:
        """Close the draft being built and return the message.

        Args:
            more: Announce another draft, which will not wait for the verdict; needs `may_draft_ahead`.
            at: The caller's clock (seconds), kept with the draft until its verdict.
            draft_s: Time that the draft model took for it (seconds), likewise.
        """
        self._move(SessionEvent.DRAFT_SENT_AHEAD if more else SessionEvent.DRAFT_SENT)
        proposals, ahead = self._drafts.building, self._drafts.tokens
        residual = self.request.policy.mode is Mode.RESIDUAL
        draft = self._message(
            base=len(self.committed) + len(ahead),
            digest=self.text.digest_with(ahead),
            fix=self._fix,
            tokens=tuple(proposal.token for proposal in proposals),
            counts=tuple(p.count for p in proposals if p.count is not None) if residual else None,
            more=more,
        )
        self._drafts.sent(draft, at=at, draft_s=draft_s, first=self._first)
        self._fix, self._first = None, False
        self.counters.drafted += len(draft.tokens)
        return draft

    @property
    def first_under_way(self) -> bool:
        """Whether the first draft since the session was opened is under way: the edge has the prompt to compute."""
        return self._drafts.first_under_way or (self._streaming is not None and self._streaming.first)

    def unanswered(self) -> tuple[Draft, ...]:
        """Return the drafts in flight, or the request to write, to be repeated when nothing came."""
        return self._drafts.drafts if self._streaming is None else (self._streaming.request,)

    # Having the edge write

    @property
    def streaming(self) -> bool:
        """Whether the edge writes by itself."""
        return self._streaming is not None

    @property
    def stream_left(self) -> int:
        """Tokens that the edge may still write by itself before it is to be asked again."""
        return 0 if self._streaming is None else max(0, self._streaming.until - len(self.committed))

    @property
    def may_renew_stream(self) -> bool:
        """Whether the edge may be asked to write on: it writes, was not told to stop, and the text has room."""
        stream, opened = self._streaming, self.opened
        if stream is None or opened is None or stream.stops:
            return False
        return stream.until < opened.max_new_tokens

    def stream(self, tokens: int) -> Draft:
        """Return the request that the edge write by itself, up to so many tokens from here on.

        Args:
            tokens: 0 to stop. What has been written by then still comes; then the session may draft.
        """
        assert self.opened is not None
        if self._drafts.drafts or self._drafts.building:
            raise ValueError("a session that has drafts under way cannot have its edge write")
        self._move(SessionEvent.STREAM_ASKED)
        residual = self.request.policy.mode is Mode.RESIDUAL
        tokens = min(tokens, self.opened.max_new_tokens - len(self.committed))
        request = self._message(
            base=len(self.committed),
            digest=self.text.digest,
            fix=self._fix,
            counts=() if residual else None,
            write=tokens,
        )
        until = len(self.committed) + tokens
        if self._streaming is None:
            self._streaming = Streaming(request, first_round=request.round, until=until, first=self._first)
        else:
            self._streaming.request, self._streaming.until = request, until
        self._fix, self._first = None, False
        return request

    # Verdicts

    def on_verdict(self, verdict: Verdict) -> list[VerdictEffect]:
        """Take a verdict; several take effect at once if they came out of order.

        Raises:
            ProtocolViolation: It is no answer to what was asked.
            SessionFailed: No correction can be drawn from as many samples as are asked for.
        """
        if self.opened is None or verdict.handle != self.opened.handle or self.ended is not None:
            return []
        self._heard = True
        if self._streaming is not None:
            return self._take_streamed(verdict, self._streaming)
        self._drafts.heard(verdict)
        effects = []
        while (decided := self._drafts.next_decided()) is not None:  # none is left once the text has ended
            effects.append(self._take(decided))
        return effects

    def cancel(self, reason: EndReason) -> None:
        """End the session from this side."""
        if self.ended is None:
            self.ended = reason
            self._move(SessionEvent.ENDED)
            self._drafts.void()

    def close(self, *, wall_ms: float) -> Close:
        """Return the Close to send once `ended` is set.

        Args:
            wall_ms: Time since the first Open.
        """
        if self.ended is None:
            raise ValueError("the session has not ended")
        return self._close_as(self.ended, wall_ms=wall_ms)

    def close_if_lost(self, *, wall_ms: float) -> Close:
        """Return the Close of a text that is never ended, as it stands."""
        return self._close_as(EndReason.FAILED, wall_ms=wall_ms)

    # Within

    def _close_as(self, reason: EndReason, *, wall_ms: float) -> Close:
        return Close(
            session=self.request.session,
            handle=self.opened.handle if self.opened else None,
            edge=self.opened.edge if self.opened else None,
            reason=reason,
            tokens=len(self.committed),
            fix=self._fix,
            digest=self.text.digest,
            wall_ms=wall_ms,
            unverified=self.text.unverified or None,
            app=None if self.granted else self.request.app,
            **{name: value for name, value in asdict(self.counters).items() if name in Close.model_fields},
        )

    def _let_go(self) -> None:
        """Void the grant, and whatever was under way."""
        self.opened = self._asking = None
        self._drafts.void()
        self._fix = self._rejection = self._streaming = None

    def _move(self, event: SessionEvent) -> None:
        self.state = next_state(self.state, event)

    def _message(self, **fields: object) -> Draft:
        assert self.opened is not None
        names = {"handle": self.opened.handle, "round": self._round, "epoch": self._epoch}
        self._round += 1
        return Draft.model_validate(names | fields)

    def _take(self, decided: DecidedDraft) -> VerdictEffect:
        self.counters.rounds += 1
        if decided.draft.tried is not None:
            return self._correct(decided)
        head = decided.head()
        self.text.commit(head)
        self.counters.accepted += len(head)
        self.counters.tested += len(head)
        valid = len(self.committed)
        rejected = decided.rejected()
        if rejected is not None:
            self.counters.tested += 1
            self._drafts.void()
            self._epoch += 1
            self._rejection = Rejection(rejected, position=valid)
            self._move(SessionEvent.REJECTED)
            effect = self._correct(decided)
            told = self._told(decided.logprobs()[: len(head)], head) + effect.logprobs
            return VerdictEffect(head + effect.tokens, valid, effect.correction, effect.request, decided, logprobs=told)
        bonus = decided.bonus()
        self.text.commit(bonus)
        if not self._drafts.drafts:
            self._move(SessionEvent.ALL_DECIDED)
        self._finish(decided.verdict.finish)
        told = self._told(decided.logprobs(), head + bonus)
        return VerdictEffect(head + bonus, valid, bonus[0] if bonus else None, decided=decided, logprobs=told)

    def _take_streamed(self, verdict: Verdict, stream: Streaming) -> list[VerdictEffect]:
        """Take a piece of what the edge writes by itself."""
        assert self.opened is not None
        if not stream.concerns(verdict):
            return []
        self._heard = True
        if verdict.written is None:
            return self._take_unstreamed(verdict)
        if verdict.base is not None and verdict.base > len(self.committed):
            return self._ask_for_missing(verdict, stream)
        effects = []
        piece: Verdict | None = verdict
        while piece is not None and self.ended is None and self._streaming is stream:
            effects += self._take_piece(piece, stream)
            piece = stream.take_early(len(self.committed))
        return effects

    def _ask_for_missing(self, verdict: Verdict, stream: Streaming) -> list[VerdictEffect]:
        """Keep a piece before which another is missing, and ask for that, once: it may only be late."""
        stream.keep(verdict)
        if stream.missed_at == len(self.committed):
            return []
        stream.missed_at = len(self.committed)
        return [VerdictEffect(request=self.stream(max(0, stream.until - len(self.committed))), streamed=True)]

    def _take_piece(self, verdict: Verdict, stream: Streaming) -> list[VerdictEffect]:
        assert self.opened is not None
        new = stream.news(verdict, text=self.committed, end_tokens=self.opened.end_tokens)
        rows = () if verdict.logprobs is None else verdict.logprobs.tokens()
        told = self._told(rows, verdict.written or ())
        told = told[len(told) - len(new) :]
        answered = stream.stops and verdict.round == stream.request.round
        if not new and not answered and verdict.finish is Finish.NO:
            return []
        self.counters.rounds += bool(new)
        self.counters.streamed += len(new)
        stream.first = False
        self.text.commit(new)
        self._finish(verdict.finish)
        # What was written before a request to stop reached the edge goes beyond the place where it was made.
        if self.ended is None and (answered or (not stream.stops and len(self.committed) >= stream.until)):
            self._streaming = None
            self._move(SessionEvent.STREAM_OVER)
        return [VerdictEffect(new, len(self.committed), streamed=True, logprobs=told, piece=verdict)]

    def _take_unstreamed(self, verdict: Verdict) -> list[VerdictEffect]:
        """Take the verdict of an edge that does not write by itself: to it the request was an empty draft."""
        if not isinstance(verdict.next, int):
            raise ProtocolViolation("The edge was asked to write, and has written nothing.")
        self.counters.rounds += 1
        self.counters.streamed += 1
        told = self._told(() if verdict.logprobs is None else verdict.logprobs.tokens(), (verdict.next,))
        self.text.commit((verdict.next,))
        self._streaming = None
        self._move(SessionEvent.STREAM_OVER)
        self._finish(verdict.finish)
        return [VerdictEffect((verdict.next,), len(self.committed), streamed=True, logprobs=told)]

    def _correct(self, decided: DecidedDraft) -> VerdictEffect:
        """Draw the correction, or ask for more samples."""
        verdict, rejection, valid = decided.verdict, self._rejection, len(self.committed)
        assert rejection is not None
        token = rejection.correction(verdict.next, policy=self.request.policy)
        if token is None:
            rejection.ask_again()
            request = self._message(base=valid, digest=self.text.digest, tried=rejection.tried)
            self._drafts.sent(request)
            return VerdictEffect(valid=valid, request=request, decided=decided)
        told = self._told_correction(decided, rejection, token)
        if rejection.device_draws:
            self._fix = token
        self._rejection = None
        self._move(SessionEvent.CORRECTED)
        self.text.commit((token,))
        self._finish(verdict.finish)
        return VerdictEffect((token,), valid, token, decided=decided, logprobs=told)

    def _told(self, rows: tuple[TokenLogprobs, ...], tokens: Sequence[int]) -> tuple[TokenLogprobs, ...]:
        """Return the log-probabilities of some tokens, none where none were asked for.

        Raises:
            ProtocolViolation: The edge has told those of more tokens, or of fewer.
        """
        if self.request.logprobs is None:
            return ()
        if len(rows) != len(tokens):
            raise ProtocolViolation(
                f"The edge has told the log-probabilities of {len(rows)} tokens, not of {len(tokens)}."
            )
        return rows

    def _told_correction(self, decided: DecidedDraft, rejection: Rejection, token: int) -> tuple[TokenLogprobs, ...]:
        """Return the log-probabilities of a correction; see `schemas.logprobs` on those that the device draws."""
        before = 0 if decided.draft.tried is not None else decided.verdict.accepted
        told = self._told(decided.logprobs()[before:], (token,))
        if not told or not rejection.device_draws:
            return told
        probability = probability_of(decided.verdict.next, token)
        return (logprobs_of_correction(told[0], probability, policy=self.request.policy),)

    def _finish(self, finish: Finish) -> None:
        """End the text if the edge says so, or if the device's own correction ends it."""
        reason = self.text.end(finish)
        if reason is not None:
            self.cancel(reason)
