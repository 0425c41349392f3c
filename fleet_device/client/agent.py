"""The agent: writes one text at a time with the fleet's large model."""

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fleet_device.client.draft_sequence import DraftSequence
from fleet_device.client.driver import SessionDriver
from fleet_device.client.inbox import EdgeStateChanged, Inbox, Wake
from fleet_device.client.outbound import Outbound
from fleet_device.client.retry import RetryState, Timeouts
from fleet_device.drafters.contract import Drafter
from fleet_device.pacing.contract import Pacing
from fleet_device.pacing.session_pacing import RoundTrips, SessionPacing
from fleet_device.session.counters import SessionCounters
from fleet_device.session.machine import DeviceSession
from fleet_device.session.request import SessionRequest
from fleet_link.link import Link
from schemas.bounds import SESSION_BYTES
from schemas.control import Presence
from schemas.messages import Closed
from schemas.policy import SamplingPolicy
from schemas.reasons import EndReason

__all__ = ["Agent", "Generation"]


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
        patience: How long to wait.
    """

    link: Link
    fleet: str
    device: str
    drafter: Drafter
    pacing: Pacing
    clock: Callable[[], float]
    patience: Timeouts = field(default_factory=Timeouts)
    inbox: Inbox = field(default_factory=Inbox)
    _edges: dict[str, Presence] = field(default_factory=dict)
    _one: threading.Lock = field(default_factory=threading.Lock)

    def attach(self) -> None:
        """Subscribe; once, before the link is started."""
        self.inbox.subscribe(self.link, fleet=self.fleet, device=self.device)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        policy: SamplingPolicy,
        max_new_tokens: int,
        on_tokens: Callable[[Sequence[int]], bool | None] = lambda _tokens: None,
        cancelled: threading.Event | None = None,
    ) -> Generation:
        """Write a text. One at a time: a second caller waits for the first.

        Args:
            prompt: Token ids.
            policy: Sampling, with the seed.
            max_new_tokens: Most tokens to write.
            on_tokens: Told of newly committed tokens, on this thread; returns True if the text has come to its
                end for the application, by a stop string say.
            cancelled: Set it, and call `wake`, to end the session early.

        Raises:
            SessionRefused: The edge declined.
            EdgeUnavailable: No edge answers.
            SessionFailed: The session could not be brought to its end.
            ProtocolViolation: The edge answered something that no correct edge answers.
            DrafterError: The draft model failed, or the prompt has a token that it does not know.
        """
        with self._one:
            self._catch_up()
            terms = SessionRequest(
                session=secrets.token_bytes(SESSION_BYTES),
                prompt=tuple(prompt),
                policy=policy,
                max_new_tokens=max_new_tokens,
                vocabulary=self.drafter.vocabulary,
                draft_model=self.drafter.name,
                quantization=self.drafter.quantization,
            )
            session = DeviceSession(terms)
            talk = SessionDriver(
                session=session,
                drafting=DraftSequence(session, self.drafter, self.clock),
                pace=SessionPacing(session, self.pacing, self.clock),
                wire=Outbound(self.link, self.fleet, self.device, self.inbox),
                inbox=self.inbox,
                edges=self._edges,
                watch=RetryState(self.patience, self.clock),
                clock=self.clock,
                on_tokens=on_tokens,
                cancelled=cancelled or threading.Event(),
            )
            talk.run()
            return Generation(
                session=terms.session,
                tokens=tuple(session.committed),
                reason=session.ended or EndReason.FAILED,
                counters=session.counters,
                closed=talk.closed,
                wall_ms=(self.clock() - talk.started) * 1e3,
                first_ms=None if talk.first_at is None else (talk.first_at - talk.started) * 1e3,
                resumes=talk.watch.resumes,
                drafts=talk.pace.drafts,
                edge=talk.session.opened.edge if talk.session.opened else None,
                round_trips=talk.pace.round_trips,
            )

    def wake(self) -> None:
        """Make a waiting `generate` look at its cancellation flag."""
        self.inbox.put(Wake())

    def _catch_up(self) -> None:
        """Take note of the edges' states; whatever else has arrived belongs to sessions that are over."""
        while (event := self.inbox.take()) is not None:
            if isinstance(event, EdgeStateChanged):
                self._edges[event.edge] = event.presence
