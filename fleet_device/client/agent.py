"""Agent of a device: writes texts with the fleet's large model, one or several at once."""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.errors import GrammarBusy, GrammarError, GrammarUnavailable
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.mqtt.link import Link
from fleet_device.client.drafting import DraftConstraint, Drafting, DraftSequence
from fleet_device.client.driver import SessionDriver
from fleet_device.client.inbox import ConnectionChanged, EdgeStateChanged, Event, Inbox, Wake
from fleet_device.client.lanes import Handles, Lane, Lanes
from fleet_device.client.outbound import Outbound
from fleet_device.client.reports import UnverifiedReports
from fleet_device.client.request import GenerateRequest, RequestContext
from fleet_device.client.retry import EdgeAvailability, RetryPolicy, RetryState
from fleet_device.client.unconfirmed import UnconfirmedCloses
from fleet_device.drafters.contract import Drafter, KnowsTokens
from fleet_device.drafters.none import NoDrafter
from fleet_device.errors import SessionRefused
from fleet_device.offline import OfflinePolicy
from fleet_device.pacing.contract import STREAMED, Choice, FixedPacing, Pacing
from fleet_device.pacing.session_pacing import RoundTrips, SessionPacing
from fleet_device.session.machine import DeviceSession
from fleet_device.session.states import SessionCounters
from fleet_device.session.text import SessionRequest
from schemas.bounds import MAX_WINDOW, SESSION_BYTES
from schemas.control import Presence
from schemas.grammar import Grammar
from schemas.messages import Close, Closed
from schemas.policy import SamplingPolicy
from schemas.reasons import EndReason, RefusalCode

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished text.

    Attributes:
        session: Its id, as in the session log.
        tokens: The text.
        reason: How it ended.
        counters: What the device counted.
        closed: What the edge counted, if its last word arrived.
        wall_ms: From Open to the end.
        first_ms: From Open to the first committed token; None if there was none.
        resumes: How often the session was opened again.
        drafts: Drafts sent.
        edge: Who verified the end of it.
        round_trips: From sending a draft to its verdict.
        choice: The plan that was followed at its end, and why.
        unverified: Tokens at the end of the text that do not follow the target's law: the device has written on without
            an edge, or an edge behind that.
        quota_wait_ms: How long it waited because the device had used up a quota at the edge.
    """

    session: bytes
    tokens: tuple[int, ...]
    reason: EndReason
    counters: SessionCounters
    closed: Closed | None
    wall_ms: float
    first_ms: float | None
    resumes: int
    drafts: int
    edge: str | None = None
    round_trips: RoundTrips = field(default_factory=RoundTrips)
    choice: Choice | None = None
    unverified: int = 0
    quota_wait_ms: float = 0.0

    @property
    def mean_draft(self) -> float | None:
        """Tokens of a draft, or None if there was none."""
        return self.counters.drafted / self.drafts if self.drafts else None


@dataclass(slots=True)
class Agent:
    """A device's end of the fleet.

    Attributes:
        link: To the broker; `attach` before it is started.
        fleet: The fleet's name.
        device: This device's name.
        drafter: The draft model.
        pacing: How much to draft.
        clock: Monotonic seconds.
        inbox: What arrives, and the edges' states.
        padding: Drafts are filled up to a multiple of so many bytes; 0 leaves them as they are.
        window: Most drafts of a text under way at once, whatever an edge grants.
        beside: Further sequences of the draft model, each with a pacing of its own, for as many more requests at once.
        edge_only: Number of further requests at once, which use edge-only decoding.
        may_stream: Whether requests may use edge-only decoding; otherwise they wait for the draft model.
        reports: Keeps what is to be told of texts that ended without an edge; without it, some are kept in memory.
    """

    link: Link
    fleet: str
    device: str
    drafter: Drafter
    pacing: Pacing
    clock: Callable[[], float]
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    inbox: Inbox = field(default_factory=Inbox)
    padding: int = 0
    window: int = MAX_WINDOW
    beside: Sequence[tuple[Drafter, Pacing]] = ()
    edge_only: int = 0
    may_stream: bool = True
    reports: UnverifiedReports | None = None
    _lanes: Lanes = field(init=False)
    _handles: Handles = field(default_factory=Handles)
    _outbound: Outbound = field(init=False)
    _unconfirmed: UnconfirmedCloses = field(init=False)
    _availability: EdgeAvailability = field(init=False)
    _grammars: GrammarCompiler = field(init=False)

    def __post_init__(self) -> None:
        self._outbound = Outbound(self.link, self.fleet, self.device, self.inbox, self.padding)
        self._unconfirmed = UnconfirmedCloses(self._outbound.close)
        self._availability = EdgeAvailability(self.clock, self.inbox.edges)
        further = [Lane(drafter, pacing, self.inbox.beside()) for drafter, pacing in self.beside]
        drafter = NoDrafter(self.drafter.vocabulary, self.drafter.codec, context=self.drafter.context)
        streamed = FixedPacing(STREAMED, stream=True)
        further += [
            Lane(drafter.another(), streamed, self.inbox.beside(), edge_only=True) for _ in range(self.edge_only)
        ]
        self._lanes = Lanes([Lane(self.drafter, None, self.inbox), *further])
        self._grammars = GrammarCompiler(self._grammar_tokenizer)

    def repace(self, make: Callable[[], Pacing]) -> None:
        """Give the texts that are yet to begin new pacings: what the old ones have learned is forgotten."""
        self._lanes.repace(make)

    def attach(self) -> None:
        """Subscribe; once, before the link is started."""
        self.inbox.listener = self._on_event
        if self.reports is not None:
            self.reports.send = self._outbound.close
            self.reports.ready = lambda: self._outbound.connected and bool(self.inbox.edges.online())
        self.inbox.subscribe(self.link, fleet=self.fleet, device=self.device)

    def generate(self, request: GenerateRequest, context: RequestContext | None = None) -> Generation:
        """Run a request, next to others. One that needs the draft model waits for a sequence of it.

        The prompt and `max_new_tokens` are taken as they are; stop strings are the caller's.

        Args:
            request: What to write.
            context: Receives tokens, and may cancel the request.

        Raises:
            SessionRefused: The edge declined.
            EdgeUnavailable: No edge answers.
            SessionFailed: The session could not be brought to its end.
            ProtocolViolation: The edge answered something that no correct edge answers.
            DrafterError: The draft model failed, or the prompt has a token that it does not know.
            TextCancelled: The request was cancelled while it waited for the draft model.
        """
        context = context or RequestContext()
        asked_at = self.clock()
        # One that may have to go on alone cannot do so without a draft model.
        needs_model = not self.may_stream or request.outages.policy is OfflinePolicy.LOCAL
        with (
            self._lanes.take(request.prompt, drafts=needs_model, cancellation=context.cancellation) as lane,
            lane.inbox.reading(),
        ):
            context.on_turn(self.clock() - asked_at)
            asked = SessionRequest(
                session=secrets.token_bytes(SESSION_BYTES),
                prompt=tuple(request.prompt),
                policy=request.policy,
                max_new_tokens=request.max_new_tokens,
                vocabulary=lane.drafter.vocabulary,
                draft_model=lane.drafter.name,
                quantization=lane.drafter.quantization,
                logprobs=request.logprobs,
                app=request.app,
            )
            outages = request.outages
            constraint = self._constraint(request.policy)
            self._availability.check_refusal(self.retry_policy.open_s)
            session = DeviceSession(asked, window=self.window, revisable=outages.revisable and outages.rejoin)
            pacing = self.pacing if lane.pacing is None else lane.pacing
            outbound = replace(self._outbound, inbox=lane.inbox, padding=self.padding)
            retry = RetryState(self.retry_policy, session, outbound, self._availability, outages, context.on_wait)
            if (left_s := self._availability.refused_s) > 0.0:
                retry.hold_for_quota(left_s, "the last request used up a quota of the device at the edge.")
            drafts = DraftSequence(session, lane.drafter, self.clock, constraint)
            driver = SessionDriver(
                session=session,
                drafting=Drafting(session, drafts, SessionPacing(session, pacing, self.clock, source=drafts.source)),
                outbound=outbound,
                inbox=lane.inbox,
                retry=retry,
                context=replace(context, on_void=self._forgetting(asked.session, context.on_void)),
                on_local=self._keep_under_way,
                claim=lambda handle: self._handles.claim(asked.session, handle),
            )
            closing = driver.closing
            try:
                with context.cancellation.waking(lambda: lane.inbox.put(Wake())):
                    driver.run()
            finally:
                self._handles.release(asked.session)
                if (source := drafts.source) is not None and not session.text.unverified:
                    source.remember(asked.prompt, session.committed)
                if closing.sent is not None and closing.answer is None:
                    self._keep(closing.sent, granted=session.granted)
            generation = Generation(
                session=asked.session,
                tokens=tuple(session.committed),
                reason=session.ended or EndReason.FAILED,
                counters=session.counters,
                closed=closing.answer,
                wall_ms=(self.clock() - closing.started) * 1e3,
                first_ms=None if driver.first_at is None else (driver.first_at - closing.started) * 1e3,
                resumes=retry.resumes,
                drafts=driver.drafting.pacing.drafts,
                edge=session.opened.edge if session.opened else None,
                round_trips=driver.drafting.pacing.round_trips,
                choice=pacing.choice(),
                unverified=session.text.unverified,
                quota_wait_ms=retry.quota_wait_s * 1e3,
            )
            _log_end(generation)
            return generation

    def _keep(self, close: Close, *, granted: bool) -> None:
        """Keep a Close that no edge has confirmed, to be said again."""
        if close.unverified and self.reports is not None:
            self.reports.keep(close)
        elif close.unverified or granted:
            self._unconfirmed.keep(close)

    def _keep_under_way(self, close: Close) -> None:
        if self.reports is not None:
            self.reports.keep(close, under_way=True)

    def _forgetting(self, session: bytes, on_void: Callable[[int], None]) -> Callable[[int], None]:
        """Return what forgets a session's report where nothing unverified is left of the text."""

        def void(length: int) -> None:
            if self.reports is not None:
                self.reports.forget(session)
            on_void(length)

        return void

    def absent_s(self) -> float:
        """Return for how long there has been no broker, or no edge (seconds); 0 if there is one."""
        return self._availability.absent_s

    def _on_event(self, event: Event) -> None:
        if isinstance(event, ConnectionChanged | EdgeStateChanged):
            there = any(state.presence is not Presence.OFFLINE for state in self.inbox.edges.known())
            up = event.up if isinstance(event, ConnectionChanged) else self._outbound.connected
            self._availability.note_presence(absent=not up or not there)
        self._unconfirmed.on_event(event)
        if self.reports is not None:
            self.reports.on_event(event)

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar, so that it is known when a text needs it. Callable on any thread.

        Raises:
            SessionRefused: It cannot be used.
        """
        try:
            self._grammars.compiled(grammar)
        except GrammarError as error:
            code = RefusalCode.BUSY if isinstance(error, GrammarBusy) else RefusalCode.GRAMMAR
            raise SessionRefused(code, str(error)) from None

    def close(self) -> None:
        """End the process that compiles grammars."""
        self._grammars.close()

    def _constraint(self, policy: SamplingPolicy) -> DraftConstraint | None:
        """Return the constraint of a text that has a grammar.

        Raises:
            SessionRefused: The grammar cannot be used; no edge was asked.
        """
        if policy.grammar is None:
            return None
        self.check_grammar(policy.grammar)
        return DraftConstraint(self._grammars.matcher(policy.grammar))

    def _grammar_tokenizer(self) -> GrammarTokenizer:
        codec = self.drafter.codec
        if not isinstance(codec, KnowsTokens):
            raise GrammarUnavailable(f"The draft model {self.drafter.name} does not say what its tokens read.")
        return codec.grammar_tokenizer()


def _log_end(generation: Generation) -> None:
    """Say in the device's own log that a text has ended."""
    counted = generation.counters
    session, reason = generation.session.hex(), generation.reason.value
    _log.info(
        "Session %s has ended (%s): %d tokens, %d of %d draft tokens accepted, %d rounds, %d resumes.",
        session,
        reason,
        len(generation.tokens),
        counted.accepted,
        counted.tested,
        counted.rounds,
        generation.resumes,
        extra={
            "session": session,
            "edge": generation.edge,
            "reason": reason,
            "tokens": len(generation.tokens),
            "accepted": counted.accepted,
            "tested": counted.tested,
            "rounds": counted.rounds,
            "resumes": generation.resumes,
        },
    )
