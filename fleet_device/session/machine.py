"""Device session: the protocol's state machine, without I/O and without a clock.

It takes proposals and verdicts and returns what to send. Its states are those of `fleet_device.session.states`. The
drafts in flight follow the committed tokens. A rejection voids them and begins a new epoch, at both ends; nothing is
drafted until it is corrected.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

from fleet_device.errors import ProtocolViolation, SessionRefused
from fleet_device.session.sequence import (
    CommittedTokens,
    DraftsInFlight,
    EdgeOnlyDecoding,
    Rejection,
    SentDraft,
    TokenSequence,
    VerdictEffect,
)
from fleet_device.session.states import SessionCounters, SessionEvent, SessionState, next_state
from sampling.distribution import Dist, point_mass
from sampling.downlink import probability_of
from sampling.drawing import propose
from sampling.verification import logprobs_of_correction
from schemas.fields import MAX_WINDOW, TokenLogprobs
from schemas.messages import Close, Closed, Draft, Open, Opened, Verdict
from schemas.policy import Mode
from schemas.reasons import EndReason, Finish, RefusalCode
from schemas.vocabulary import extend_digest


@dataclass(slots=True)
class DeviceSession:
    """The state machine.

    Attributes:
        counters: Times are added by the caller.
        granted: Whether any edge has taken the session so far.
        target_id: Identity of the target model that the request began with; None until an edge has granted it.
        any_target: Whether another target model may continue.
        prompt_logprobs: Those of the prompt's tokens after the first, if they were requested and the first token is
            here.
    """

    request: Open
    window: int = MAX_WINDOW
    sequence: TokenSequence = field(init=False)
    counters: SessionCounters = field(default_factory=SessionCounters)
    ended: EndReason | None = None
    opened: Opened | None = None
    state: SessionState = SessionState.NEW
    granted: bool = False
    target_id: bytes | None = None
    any_target: bool = False
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    _attempt: int = -1
    _asking: Open | None = None  # the last Open, until an edge has answered it or tokens were committed
    _epoch: int = 0
    _round: int = 0
    _fix: int | None = None
    _first: bool = True  # no draft was sent since the session was opened
    _heard: bool = False  # a verdict has come since
    _drafts: DraftsInFlight = field(default_factory=DraftsInFlight)
    _rejection: Rejection | None = None
    _edge_only: EdgeOnlyDecoding | None = None

    def __post_init__(self) -> None:
        self.sequence = TokenSequence(self.request.vocabulary.size, self.request.max_new_tokens)

    @property
    def committed(self) -> list[int]:
        return self.sequence.tokens

    # Opening and resuming

    def continue_from(self, committed: Iterable[CommittedTokens], *, attempt: int) -> None:
        """Begin behind what another process has committed; `attempt` is above that of any of its Opens."""
        self._attempt = attempt - 1
        for tokens in committed:
            if not all(origin.verified for origin in tokens.origins):
                self.sequence.leave_target()
            self.sequence.commit(tokens.ids)
            self.target_id = tokens.target_id or self.target_id

    @property
    def wanted_target(self) -> bytes | None:
        """Identity of the target model that an edge must have to continue; None if any will do."""
        if self.any_target:
            return None
        return self.target_id if self.committed else self.request.target_id

    @property
    def open_sent(self) -> bool:
        """An Open was made, so that some edge may have the session."""
        return self._attempt >= 0

    @property
    def may_open(self) -> bool:
        """No edge has the session, or may still answer an Open."""
        return (
            self.opened is None and self._asking is None and self.state not in (SessionState.LOCAL, SessionState.ENDED)
        )

    def open(self, *, wait_s: float | None = None) -> Open:
        """Return a new Open; all drafts in flight are void, and so are answers to older Opens."""
        self._move(SessionEvent.OPEN)
        self._attempt += 1
        self._let_go()
        resume = tuple(self.committed) if self._attempt or self.committed else None
        echo = self.request.echo if not self.committed else None
        named = {"resume": resume, "target_id": self.wanted_target, "echo": echo, "wait_s": wait_s}
        self._asking = self.request.model_copy(update={"attempt": self._attempt, **named})
        return self._asking

    def open_again(self, *, wait_s: float | None = None) -> Open:
        """Return the Open to repeat because no answer has come.

        It is the last one, if that may still be answered: on a slow line the answer may only be late. The edge that has
        taken it ignores the repeat.
        """
        if self._asking is None:
            return self.open(wait_s=wait_s)
        self._move(SessionEvent.OPEN)
        return self._asking

    def on_opened(self, opened: Opened) -> bool:
        """Record the edge's grant; return False if it answers an older Open, or one that was answered already."""
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
        if self.wanted_target not in (None, opened.target_id):
            raise ProtocolViolation(
                f"Edge {opened.edge!r} continues with target model {opened.target_id.hex()} what another one began."
            )
        self._move(SessionEvent.GRANTED)
        if not self.committed:
            self.target_id = opened.target_id
        elif opened.target_id != self.target_id:
            self.sequence.leave_target()
        self.opened, self.granted, self._asking = opened, True, None
        self.sequence.most, self.sequence.end_tokens = opened.max_new_tokens, opened.end_tokens
        self._epoch, self._first = 0, True
        self._heard = False
        if self.request.logprobs is not None and opened.logprobs is None:
            raise SessionRefused(
                RefusalCode.LOGPROBS,
                f"Edge {opened.edge!r} sends no log-probabilities; update it, or ask without `logprobs`.",
            )
        return True

    def on_undelivered(self) -> None:
        if self.opened is None and self.ended is None:
            self._move(SessionEvent.UNDELIVERED)

    def on_postponed(self) -> None:
        if self.opened is None and self.ended is None:
            self._move(SessionEvent.POSTPONED)

    def suspend(self) -> None:
        """Drop the grant and all drafts in flight; the session is opened again later."""
        self._move(SessionEvent.POSTPONED)
        self._let_go()

    def concerns(self, closed: Closed) -> bool:
        """An edge's last message concerns the session in its present state.

        Not one that concerns a part that was resumed elsewhere since, or comes from an edge that has verified
        nothing while ours has: a repeated Open may reach a second edge, which closes the session when no draft comes.
        """
        if closed.session != self.request.session:
            return False
        if closed.attempt is None or self.opened is None:
            return True
        return closed.attempt == self.opened.attempt and (closed.rounds > 0 or not self._heard)

    # Without an edge

    @property
    def local(self) -> bool:
        return self.state is SessionState.LOCAL

    def go_local(self, end_tokens: Collection[int]) -> None:
        """Continue without an edge; drafts in flight are void. `end_tokens` count if no edge has named any."""
        self._move(SessionEvent.WENT_LOCAL)
        self._let_go()
        self.sequence.go_on_alone(end_tokens)
        self._finish(Finish.NO)  # the length limit may be reached

    def generate_alone(self, q: Dist) -> int:
        """Draw the next token from the draft model's distribution; no edge verifies it.

        It is drawn like a draft token: with the same random numbers, in coupled mode with the noise of both ends.
        """
        if not self.local:
            raise ValueError("an edge has the session")
        token = propose(q, policy=self.request.policy, position=len(self.committed)).token
        self.sequence.commit_unverified(token)
        self._finish(Finish.NO)
        return token

    # Drafting

    @property
    def position(self) -> int:
        return len(self.committed) + self._drafts.length

    @property
    def may_send(self) -> bool:
        return self.state is SessionState.DRAFTING

    @property
    def may_draft_ahead(self) -> bool:
        """The draft being built may announce another: the window and the length limit have room."""
        opened, drafts = self.opened, self._drafts
        if opened is None or not drafts.building or drafts.last_token in opened.end_tokens:
            return False
        window = min(opened.window, self.window)
        return len(drafts.drafts) + 1 < window and self.position < opened.max_new_tokens

    def room(self, limit: int) -> int:
        """Return how many more tokens the draft being built may take, `limit` being the caller's own bound."""
        opened, drafts = self.opened, self._drafts
        if opened is None or not self.may_send or drafts.last_token in opened.end_tokens:
            return 0
        longest = min(limit, opened.max_draft) - len(drafts.building)
        return max(0, min(longest, opened.max_new_tokens - self.position))

    @property
    def chances(self) -> tuple[float, ...]:
        """Probabilities with which the tokens of the draft being built were drawn."""
        return tuple(proposal.chance for proposal in self._drafts.building)

    def propose(self, q: Dist) -> int:
        """Draw the next draft token from the drafter's distribution."""
        proposal = propose(q, policy=self.request.policy, position=self.position)
        self._drafts.building.append(proposal)
        return proposal.token

    def propose_forced(self, token: int) -> None:
        """Append the only token that a grammar allows: its probability is 1, whatever the drafter."""
        proposal = propose(point_mass(token), policy=self.request.policy, position=self.position)
        self._drafts.building.append(replace(proposal, forced=True))

    @property
    def ahead(self) -> list[int]:
        building = (proposal.token for proposal in self._drafts.building)
        return [*self.committed, *self._drafts.tokens, *building]

    @property
    def forced(self) -> int:
        return sum(proposal.forced for proposal in self._drafts.building)

    def finish_draft(self, *, more: bool = False, at: float = 0.0, draft_s: float = 0.0) -> Draft:
        self._move(SessionEvent.DRAFT_SENT_AHEAD if more else SessionEvent.DRAFT_SENT)
        proposals, ahead = self._drafts.building, self._drafts.tokens
        residual = self.request.policy.mode is Mode.RESIDUAL
        draft = self._message(
            base=len(self.committed) + len(ahead),
            digest=extend_digest(self.sequence.digest, ahead),
            fix=self._fix,
            tokens=tuple(proposal.token for proposal in proposals),
            counts=tuple(p.count for p in proposals if p.count is not None) if residual else None,
            more=more,
        )
        self._drafts.add(draft, at=at, draft_s=draft_s, first=self._first)
        self._fix, self._first = None, False
        self.counters.drafted += len(draft.tokens)
        return draft

    @property
    def first_under_way(self) -> bool:
        """The edge computes the prompt: the first draft since the session was opened is in flight."""
        return self._drafts.first_under_way or (self._edge_only is not None and self._edge_only.first)

    def unanswered(self) -> tuple[Draft, ...]:
        """Return the messages to repeat when no verdict came."""
        return self._drafts.drafts if self._edge_only is None else (self._edge_only.request,)

    # Edge-only decoding

    @property
    def edge_only(self) -> bool:
        return self._edge_only is not None

    @property
    def edge_only_left(self) -> int:
        return 0 if self._edge_only is None else max(0, self._edge_only.until - len(self.committed))

    @property
    def may_renew_edge_only(self) -> bool:
        """The edge decodes without drafts, was not asked to stop, and may be asked for more."""
        decoding, opened = self._edge_only, self.opened
        if decoding is None or opened is None or decoding.stops:
            return False
        return decoding.until < opened.max_new_tokens

    def request_edge_only(self, tokens: int) -> Draft:
        """Return the request for edge-only decoding of `tokens` more; 0 stops it once the edge receives that."""
        assert self.opened is not None
        if self._drafts.drafts or self._drafts.building:
            raise ValueError("a session with drafts in flight cannot use edge-only decoding")
        self._move(SessionEvent.EDGE_ONLY_REQUESTED)
        residual = self.request.policy.mode is Mode.RESIDUAL
        tokens = min(tokens, self.opened.max_new_tokens - len(self.committed))
        request = self._message(
            base=len(self.committed),
            digest=self.sequence.digest,
            fix=self._fix,
            counts=() if residual else None,
            write=tokens,
        )
        until = len(self.committed) + tokens
        if self._edge_only is None:
            self._edge_only = EdgeOnlyDecoding(request, first_round=request.round, until=until, first=self._first)
        else:
            self._edge_only.request, self._edge_only.until = request, until
        self._fix, self._first = None, False
        return request

    # Verdicts

    def on_verdict(self, verdict: Verdict) -> list[VerdictEffect]:
        """Apply a verdict; several take effect at once if they came out of order.

        Raise ProtocolViolation if it does not answer what was requested, SessionFailed if no correction can be drawn
        from the permitted number of samples.
        """
        if self.opened is None or verdict.handle != self.opened.handle or self.ended is not None:
            return []
        self._heard = True
        if self._edge_only is not None:
            return self._apply_edge_only(verdict, self._edge_only)
        self._drafts.keep_verdict(verdict)
        effects = []
        while (decided := self._drafts.next_decided()) is not None:  # none is left at the end
            effects.append(self._apply(decided))
        return effects

    def cancel(self, reason: EndReason) -> None:
        if self.ended is None:
            self.ended = reason
            self._move(SessionEvent.ENDED)
            self._drafts.void()

    def close(self, *, wall_ms: float, if_lost: bool = False) -> Close:
        """Return the Close of the ended session, or with `if_lost` the one to report should it never end."""
        reason = EndReason.FAILED if if_lost else self.ended
        if reason is None:
            raise ValueError("the session has not ended")
        counted = {name: value for name, value in asdict(self.counters).items() if name in Close.model_fields}
        return Close(
            session=self.request.session,
            handle=self.opened.handle if self.opened else None,
            edge=self.opened.edge if self.opened else None,
            reason=reason,
            tokens=len(self.committed),
            fix=self._fix,
            digest=self.sequence.digest,
            wall_ms=wall_ms,
            unverified=self.sequence.unverified or None,
            app=None if self.granted else self.request.app,
            **counted | {"quota_wait_ms": self.counters.quota_wait_ms or None},
        )

    # Private

    def _let_go(self) -> None:
        self.opened = self._asking = None
        self._drafts.void()
        self._fix = self._rejection = self._edge_only = None

    def _move(self, event: SessionEvent) -> None:
        self.state = next_state(self.state, event)

    def _message(self, **fields: object) -> Draft:
        assert self.opened is not None
        names = {"handle": self.opened.handle, "round": self._round, "epoch": self._epoch}
        self._round += 1
        return Draft.model_validate(names | fields)

    def _apply(self, decided: SentDraft) -> VerdictEffect:
        self.counters.rounds += 1
        if decided.draft.tried is not None:
            return self._correct(decided)
        head, rejected = decided.head(), decided.rejected()
        if rejected is not None:
            self._drafts.void()
            self._epoch += 1
            self._move(SessionEvent.REJECTED)
        self.sequence.commit(head)
        self.counters.note_draft(len(decided.draft.tokens), accepted=len(head))
        valid = len(self.committed)
        if rejected is not None:
            self._rejection = Rejection(rejected, position=valid)
            effect = self._correct(decided)
            logprobs = self._logprobs(decided.logprobs()[: len(head)], head) + effect.logprobs
            return VerdictEffect(
                head + effect.tokens, valid, effect.correction, effect.request, decided, logprobs=logprobs
            )
        bonus = decided.bonus()
        self.sequence.commit(bonus)
        if not self._drafts.drafts:
            self._move(SessionEvent.ALL_DECIDED)
        self._finish(decided.verdict.finish)
        logprobs = self._logprobs(decided.logprobs(), head + bonus)
        return VerdictEffect(head + bonus, valid, bonus[0] if bonus else None, decided=decided, logprobs=logprobs)

    def _apply_edge_only(self, verdict: Verdict, decoding: EdgeOnlyDecoding) -> list[VerdictEffect]:
        assert self.opened is not None
        if not decoding.concerns(verdict):
            return []
        self._heard = True
        if verdict.written is None:
            raise ProtocolViolation("The edge was asked to decode, and has sent no tokens.")
        if verdict.base is not None and verdict.base > len(self.committed):
            return self._request_missing(verdict, decoding)
        effects = []
        piece: Verdict | None = verdict
        while piece is not None and self.ended is None and self._edge_only is decoding:
            effects += self._apply_piece(piece, decoding)
            piece = decoding.take_early(len(self.committed))
        return effects

    def _request_missing(self, verdict: Verdict, decoding: EdgeOnlyDecoding) -> list[VerdictEffect]:
        """Keep a piece that came too early, and request the missing one, once: it may only be late."""
        decoding.keep(verdict)
        if decoding.missed_at == len(self.committed):
            return []
        decoding.missed_at = len(self.committed)
        return [
            VerdictEffect(request=self.request_edge_only(max(0, decoding.until - len(self.committed))), edge_only=True)
        ]

    def _apply_piece(self, verdict: Verdict, decoding: EdgeOnlyDecoding) -> list[VerdictEffect]:
        assert self.opened is not None
        new = decoding.new_tokens(verdict, text=self.committed, end_tokens=self.opened.end_tokens)
        rows = () if verdict.logprobs is None else verdict.logprobs.tokens()
        logprobs = self._logprobs(rows, verdict.written or ())
        logprobs = logprobs[len(logprobs) - len(new) :]
        answered = decoding.stops and verdict.round == decoding.request.round
        if not new and not answered and verdict.finish is Finish.NO:
            return []
        if new:
            self._read_prompt(verdict)
        self.counters.rounds += bool(new)
        self.counters.edge_only += len(new)
        decoding.first = False
        self.sequence.commit(new)
        self._finish(verdict.finish)
        # Tokens that the edge decoded before it received a request to stop go beyond that request's position.
        if self.ended is None and (answered or (not decoding.stops and len(self.committed) >= decoding.until)):
            self._edge_only = None
            self._move(SessionEvent.EDGE_ONLY_ENDED)
        decided = SentDraft(decoding.request, answer=verdict)
        return [VerdictEffect(new, len(self.committed), edge_only=True, logprobs=logprobs, decided=decided)]

    def _correct(self, decided: SentDraft) -> VerdictEffect:
        verdict, rejection, valid = decided.verdict, self._rejection, len(self.committed)
        assert rejection is not None
        token = rejection.correction(verdict.next, policy=self.request.policy)
        if token is None:
            rejection.note_request()
            request = self._message(base=valid, digest=self.sequence.digest, tried=rejection.tried)
            self._drafts.add(request)
            return VerdictEffect(valid=valid, request=request, decided=decided)
        logprobs = self._correction_logprobs(decided, rejection, token)
        if rejection.device_draws:
            self._fix = token
        self._rejection = None
        self._move(SessionEvent.CORRECTED)
        self.sequence.commit((token,))
        self._finish(verdict.finish)
        return VerdictEffect((token,), valid, token, decided=decided, logprobs=logprobs)

    def _logprobs(self, rows: tuple[TokenLogprobs, ...], tokens: Sequence[int]) -> tuple[TokenLogprobs, ...]:
        """Return the log-probabilities, none if none were requested; ProtocolViolation if they differ in number."""
        if self.request.logprobs is None:
            return ()
        if len(rows) != len(tokens):
            raise ProtocolViolation(
                f"The edge has sent the log-probabilities of {len(rows)} tokens, not of {len(tokens)}."
            )
        return rows

    def _read_prompt(self, verdict: Verdict) -> None:
        """Keep the prompt's log-probabilities, which come with the first token if they were requested."""
        if self.request.echo and not self.committed:
            rows = () if verdict.prompt is None else verdict.prompt.tokens()
            self.prompt_logprobs = self._logprobs(rows, self.request.prompt[1:])

    def _correction_logprobs(self, decided: SentDraft, rejection: Rejection, token: int) -> tuple[TokenLogprobs, ...]:
        """Return the log-probabilities of a correction; on those that the device draws see `schemas.fields`."""
        before = 0 if decided.draft.tried is not None else decided.verdict.accepted
        logprobs = self._logprobs(decided.logprobs()[before:], (token,))
        if not logprobs or not rejection.device_draws:
            return logprobs
        probability = probability_of(decided.verdict.next, token)
        return (logprobs_of_correction(logprobs[0], probability, policy=self.request.policy),)

    def _finish(self, finish: Finish) -> None:
        """End the session if the edge says so, or if the last token or the length ends it."""
        reason = self.sequence.end(finish)
        if reason is not None:
            self.cancel(reason)
