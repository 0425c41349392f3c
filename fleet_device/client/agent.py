"""Agent of a device: runs one or several requests at once with the large model of the fleet."""

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.errors import GrammarBusy, GrammarError, GrammarUnavailable
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.mqtt.link import Link
from fleet_device.client.decision import EdgeAvailability, RetryPolicy, RetryState
from fleet_device.client.drafting import DraftConstraint, Drafting, DraftSequence, SessionPacing
from fleet_device.client.driver import SessionDriver
from fleet_device.client.messaging import ConnectionChanged, EdgeStateChanged, Event, Inbox, Outbound, Wake
from fleet_device.client.reports import UnconfirmedCloses, UnverifiedReports
from fleet_device.drafters.contract import Drafter, DrafterError, GrammarCodec, known_tokens, require_tokens
from fleet_device.drafters.without_model import NoDrafter
from fleet_device.errors import InvalidRequest, SessionRefused, TextCancelled
from fleet_device.pacing.contract import EDGE_ONLY_TOKENS, FixedPacing, Pacing
from fleet_device.requests.generate import Cancellation, GenerateRequest, Generation, RequestContext
from fleet_device.session.machine import DeviceSession
from fleet_device.session.sequence import session_request
from fleet_device.settings import OfflinePolicy
from schemas.control import Presence
from schemas.fields import SESSION_BYTES
from schemas.messages import Close
from schemas.policy import Grammar, SamplingPolicy
from schemas.reasons import EndReason, RefusalCode


@dataclass(slots=True, eq=False)
class Lane:
    """A place for one running request, which reuses keys, values and measurements of earlier ones.

    `pacing` of None is the agent's; with `edge_only` there is no draft model.
    """

    drafter: Drafter
    pacing: Pacing | None
    inbox: Inbox
    edge_only: bool = False


class Lanes:
    """The places of a device for running requests.

    No more than `most` are taken, the number of sessions that the edges allow; None if it is not known.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.most: int | None = None
        self._all = tuple(lanes)
        self._free = list(lanes)  # the one unused for longest first
        self._waiting: deque[object] = deque()  # requests that need the draft model, in order
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @contextmanager
    def acquire(
        self, prompt: Sequence[int], *, drafts: bool, cancellation: Cancellation, edge_only: bool = False
    ) -> Iterator[Lane]:
        """Wait for a free lane and yield it: the one whose draft model has computed most of the prompt.

        Requests that need the draft model get its lanes in order, before all others; others use an edge-only lane when
        those of the draft model are busy, or with `edge_only` if one is free. Raise TextCancelled if the request is
        cancelled while it waits.
        """
        with cancellation.waking(self._wake):
            lane = self._wait(prompt, cancellation, drafts=drafts, edge_only=edge_only)
        try:
            yield lane
        finally:
            with self._changed:
                self._free.append(lane)
                self._changed.notify_all()

    def _wait(self, prompt: Sequence[int], cancellation: Cancellation, *, drafts: bool, edge_only: bool) -> Lane:
        request = object()
        with self._changed:
            if drafts:
                self._waiting.append(request)
            try:
                self._changed.wait_for(lambda: self._usable(request, drafts=drafts) or cancellation.requested)
                usable = self._usable(request, drafts=drafts)
            finally:
                if drafts:
                    self._waiting.remove(request)
                    self._changed.notify_all()
            # A cancelled request that finds a lane takes it, and reports its end like any other.
            if not usable:
                raise TextCancelled("The request was cancelled while it waited for its turn.")
            lane = max(usable, key=lambda lane: (lane.edge_only is edge_only, known_tokens(lane.drafter, prompt)))
            self._free.remove(lane)
            return lane

    def _usable(self, request: object, *, drafts: bool) -> list[Lane]:
        reserved = bool(self._waiting) and self._waiting[0] is not request
        if self.most is not None:
            left = self.most - (len(self._all) - len(self._free))
            if left <= 0 or (left == 1 and reserved and not all(lane.edge_only for lane in self._free)):
                return []
        return [lane for lane in self._free if (not drafts if lane.edge_only else not reserved)]

    def limit(self, most: int | None) -> None:
        """Set the number of lanes that are taken at a time; running requests keep theirs."""
        with self._changed:
            self.most = most
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def repace(self, make: Callable[[], Pacing]) -> None:
        """Give every lane of the draft model a new pacing; running requests keep theirs."""
        with self._changed:
            for lane in self._all:
                if not lane.edge_only:
                    lane.pacing = make()


class Handles:
    def __init__(self) -> None:
        self._claimed: dict[bytes, int] = {}  # by session
        self._changing = threading.Lock()

    def claim(self, session: bytes, handle: int) -> bool:
        """Take a handle for a session, in place of its earlier one; return whether no other session has it."""
        with self._changing:
            if any(taken == handle and owner != session for owner, taken in self._claimed.items()):
                return False
            self._claimed[session] = handle
            return True

    def release(self, session: bytes) -> None:
        with self._changing:
            self._claimed.pop(session, None)


_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Agent:
    """Runs the requests of a device at the edges of its fleet.

    Drafts are padded to a multiple of `padding` bytes, 0 for none. `window` limits the drafts of a request in flight,
    whatever an edge grants. Each further sequence of the draft model in `further` serves one more request at once, with
    a separate pacing; `edge_only` lanes serve others without it. Without `edge_only_allowed`, requests wait for the
    draft model. `reports` keeps the Closes of sessions that ended without an edge; without it, some are kept in memory.
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
    window: int = 8
    further: Sequence[tuple[Drafter, Pacing]] = ()
    edge_only: int = 0
    edge_only_allowed: bool = True
    reports: UnverifiedReports | None = None
    _lanes: Lanes = field(init=False)
    _handles: Handles = field(default_factory=Handles)
    _outbound: Outbound = field(init=False)
    _unconfirmed: UnconfirmedCloses = field(init=False)
    _availability: EdgeAvailability = field(init=False)
    _grammars: GrammarCompiler = field(init=False)

    def __post_init__(self) -> None:
        self._outbound = Outbound(self.link, self.fleet, self.device, self.inbox, self.padding)
        self._unconfirmed = UnconfirmedCloses(self._outbound.publish_close)
        self._availability = EdgeAvailability(self.clock, self.inbox.edges, lambda: self._outbound.connected)
        further = [Lane(drafter, pacing, self.inbox.another()) for drafter, pacing in self.further]
        drafter = NoDrafter(self.drafter.vocabulary, self.drafter.codec)
        edge_only = FixedPacing(EDGE_ONLY_TOKENS, edge_only=True)
        further += [
            Lane(drafter.another(), edge_only, self.inbox.another(), edge_only=True) for _ in range(self.edge_only)
        ]
        self._lanes = Lanes([Lane(self.drafter, None, self.inbox), *further])
        self._grammars = GrammarCompiler(self._grammar_tokenizer)

    def repace(self, make: Callable[[], Pacing]) -> None:
        """Give future requests new pacings, which have learned nothing."""
        self._lanes.repace(make)

    def attach(self) -> None:
        """Subscribe; once, before the link is started."""
        self.inbox.listener = self._on_event
        if self.reports is not None:
            self.reports.send = self._outbound.publish_close
            self.reports.ready = lambda: self._outbound.connected and bool(self.inbox.edges.online())
        self.inbox.subscribe(self.link, fleet=self.fleet, device=self.device)

    def generate(self, request: GenerateRequest, context: RequestContext | None = None) -> Generation:
        """Run a request, next to others, with its prompt and `max_new_tokens` unchanged; stop strings are the caller's.

        Raise SessionRefused, EdgeUnavailable, SessionFailed or ProtocolViolation as the edge's answers require,
        InvalidRequest if the draft model does not know a token of the prompt, DrafterError if it failed, TextCancelled
        if the request was cancelled while it waited for the draft model.
        """
        context = context or RequestContext()
        requested_at = self.clock()
        outgrows = len(request.prompt) >= self.drafter.context
        # One that may have to go on alone cannot do so without a draft model.
        needs_model = not outgrows and (not self.edge_only_allowed or request.outages.policy is OfflinePolicy.LOCAL)
        with (
            self._lanes.acquire(
                request.prompt,
                drafts=needs_model,
                cancellation=context.cancellation,
                edge_only=request.edge_only or outgrows,
            ) as lane,
            lane.inbox.reading(),
        ):
            context.on_turn(self.clock() - requested_at)
            drafter = NoDrafter(self.drafter.vocabulary, self.drafter.codec) if outgrows else lane.drafter
            try:
                require_tokens(request.prompt, drafter.vocabulary)
            except DrafterError as error:
                raise InvalidRequest(str(error)) from error
            journal = request.journal
            opening = session_request(
                secrets.token_bytes(SESSION_BYTES) if journal is None else journal.session,
                request.prompt,
                request.policy,
                request.max_new_tokens,
                drafter.vocabulary,
                drafter.name,
                drafter.quantization,
                request.logprobs,
                request.app,
                echo=request.echo,
                target_id=request.target_id,
            )
            constraint = self._constraint(request.policy)
            self._availability.check_refusal(self.retry_policy.open_s)
            session = DeviceSession(opening, window=self.window)
            if journal is not None:
                session.continue_from(journal.committed, attempt=journal.attempt)
            pacing = self.pacing if lane.pacing is None else lane.pacing
            if request.edge_only or outgrows:
                why = "The prompt is longer than the draft model's context." if outgrows else "The request says so."
                pacing = FixedPacing(EDGE_ONLY_TOKENS, edge_only=True, reason=why)
            outbound = replace(self._outbound, inbox=lane.inbox, padding=self.padding)
            retry = RetryState(self.retry_policy, request.outages, self.clock())
            if (left_s := self._availability.refused_s) > 0.0:
                retry.hold_for_quota(
                    session, left_s, self.clock(), "the last request used up a quota of the device at the edge."
                )
            drafts = DraftSequence(session, drafter, self.clock, constraint)
            driver = SessionDriver(
                session=session,
                drafting=Drafting(session, drafts, SessionPacing(session, pacing, self.clock, source=drafts.source)),
                outbound=outbound,
                inbox=lane.inbox,
                retry=retry,
                availability=self._availability,
                context=context,
                end_tokens=request.end_tokens or drafter.codec.end_tokens,
                on_local=self._keep_under_way,
                keep=self._keep,
                claim=lambda handle: self._handles.claim(opening.session, handle),
            )
            closing = driver.closing
            try:
                with context.cancellation.waking(lambda: lane.inbox.put(Wake())):
                    driver.run()
            finally:
                self._handles.release(opening.session)
                if (source := drafts.source) is not None and not session.sequence.unverified:
                    source.remember(opening.prompt, session.committed)
            generation = Generation(
                session=opening.session,
                tokens=tuple(session.committed),
                reason=session.ended or EndReason.FAILED,
                counters=session.counters,
                closed=closing.answer,
                wall_ms=(self.clock() - closing.started) * 1e3,
                first_ms=None if driver.first_at is None else (driver.first_at - closing.started) * 1e3,
                resumes=driver.resumes,
                drafts=driver.drafting.pacing.drafts,
                edge=session.opened.edge if session.opened else None,
                round_trips=driver.drafting.pacing.round_trips,
                choice=pacing.choice(),
                unverified=session.sequence.unverified,
                target_id=session.target_id,
                prompt_logprobs=session.prompt_logprobs,
            )
            _log_end(generation)
            return generation

    def _keep(self, close: Close) -> None:
        if close.unverified and self.reports is not None:
            self.reports.keep(close)
        else:
            self._unconfirmed.keep(close)

    def _keep_under_way(self, close: Close) -> None:
        if self.reports is not None:
            self.reports.keep(close, under_way=True)

    def absent_s(self) -> float:
        """Return the time without a broker or without an edge (seconds); 0 if there is one."""
        return self._availability.absent_s

    def _on_event(self, event: Event) -> None:
        if isinstance(event, ConnectionChanged | EdgeStateChanged):
            there = any(state.presence is not Presence.OFFLINE for state in self.inbox.edges.known())
            up = event.up if isinstance(event, ConnectionChanged) else self._outbound.connected
            self._availability.note_presence(absent=not up or not there)
            allowed = [edge.sessions_per_device for edge in self.inbox.edges.online()]
            known = [most for most in allowed if most is not None]
            self._lanes.limit(sum(known) if allowed and len(known) == len(allowed) else None)
        self._unconfirmed.on_event(event)
        if self.reports is not None:
            self.reports.on_event(event)

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar before a request needs it, or raise SessionRefused. Callable from any thread."""
        try:
            self._grammars.compiled(grammar)
        except GrammarError as error:
            code = RefusalCode.BUSY if isinstance(error, GrammarBusy) else RefusalCode.GRAMMAR
            raise SessionRefused(code, str(error)) from None

    def close(self) -> None:
        self._grammars.close()

    def _constraint(self, policy: SamplingPolicy) -> DraftConstraint | None:
        """Return the constraint of a request; SessionRefused means that no edge was asked."""
        if policy.grammar is None:
            return None
        self.check_grammar(policy.grammar)
        try:
            return DraftConstraint(self._grammars.matcher(policy.grammar))
        except GrammarError:
            return None  # the edge rejects what the grammar does not allow

    def _grammar_tokenizer(self) -> GrammarTokenizer:
        codec = self.drafter.codec
        if not isinstance(codec, GrammarCodec):
            raise GrammarUnavailable(f"The draft model {self.drafter.name} does not say what its tokens read.")
        return codec.grammar_tokenizer()


def _log_end(generation: Generation) -> None:
    counted = generation.counters
    fields = {
        "session": generation.session.hex(),
        "edge": generation.edge,
        "reason": generation.reason.value,
        "tokens": len(generation.tokens),
        "accepted": counted.accepted,
        "tested": counted.tested,
        "rounds": counted.rounds,
        "resumes": generation.resumes,
    }
    words = "Session %(session)s has ended (%(reason)s): %(tokens)d tokens, %(accepted)d of %(tested)d draft tokens "
    _log.info(words + "accepted, %(rounds)d rounds, %(resumes)d resumes.", fields, extra=fields)
