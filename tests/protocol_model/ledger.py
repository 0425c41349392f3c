"""Ledger of what was published: no round may be sent in two versions, or decided in two ways."""

from dataclasses import dataclass, field

from fleet_device.session.machine import DeviceSession
from schemas.codec import decode_close, decode_draft, decode_open, decode_reply, decode_verdict
from schemas.messages import Opened, Verdict
from schemas.topics import Topic, parse
from tests.protocol_model.edges import Life
from tests.support.markov import MarkovScript


def _grant(opened: Opened) -> tuple[bytes, int, str, int]:
    return opened.session, opened.attempt, opened.edge, opened.handle


Round = tuple[str, bytes, int]
"""Device, session, number of the round."""


@dataclass(slots=True)
class Ledger:
    """What was published, as far as it must not be contradicted.

    Attributes:
        messages: Number of messages that honest devices have sent and received.
        sessions: The running session of each honest device.
        ends: Tokens and digest that the device reported at a session's end.
        decisions: The decision on each round.
        targets: The target of the edge that has sent a grant.
    """

    messages: int = 0
    sessions: dict[str, DeviceSession] = field(default_factory=dict)
    ends: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    _drafts: dict[Round, bytes] = field(default_factory=dict)
    decisions: dict[Round, object] = field(default_factory=dict)
    targets: dict[tuple[bytes, int, str, int], MarkovScript] = field(default_factory=dict)
    _written: dict[tuple[object, ...], int] = field(default_factory=dict)
    _first_rounds: dict[tuple[bytes, int], int] = field(default_factory=dict)

    def from_device(self, topic: str, payload: bytes) -> None:
        address = parse(topic)
        session = self.sessions.get(address.device or "")
        if session is None:
            return
        self.messages += 1
        name = session.request.session
        match address.topic:
            case Topic.DRAFT:
                # A handle identifies the session at one edge only; rounds are never reused, even after migration.
                key = (address.device or "", name, decode_draft(payload).round)
                assert self._drafts.setdefault(key, payload) == payload, f"round {key[2]} was sent in two versions"
            case Topic.OPEN:
                message = decode_open(payload)
                self._first_rounds[message.session, message.attempt] = session._round
            case Topic.CLOSE:
                close = decode_close(payload)
                self.ends[close.session] = close.tokens, close.digest
            case _:
                pass

    def from_edge(self, life: Life, topic: str, payload: bytes) -> None:
        address = parse(topic)
        device = address.device or ""
        self.messages += device in self.sessions
        match address.topic:
            case Topic.SESSION:
                reply = decode_reply(payload)
                if isinstance(reply, Opened):
                    life.opened[device, reply.handle] = reply.session, reply.attempt
                    self.targets[_grant(reply)] = life.target
            case Topic.VERDICT:
                verdict = decode_verdict(payload)
                session, attempt = life.opened[device, verdict.handle]
                if verdict.written is not None:
                    self._from_edge_only(life, (device, session, attempt), verdict)
                    return
                decision = (verdict.accepted, verdict.next, verdict.finish)
                key = (device, session, verdict.round)
                assert self.decisions.setdefault(key, decision) == decision, (
                    f"round {verdict.round} of {session.hex()} was decided as {self.decisions[key]} and as {decision}"
                )
                if verdict.round < self._first_rounds.get((session, attempt), 0):
                    life.astray.add((session, attempt))
            case _:
                pass

    def target_of(self, opened: Opened) -> MarkovScript:
        return self.targets[_grant(opened)]

    def _from_edge_only(self, life: Life, place: tuple[str, bytes, int], verdict: Verdict) -> None:
        """Check edge-only tokens: the same at each place of a grant, however often they are sent."""
        assert verdict.base is not None
        assert verdict.written is not None
        for position, token in enumerate(verdict.written, start=verdict.base):
            known = self._written.setdefault((id(life), *place, position), token)
            assert known == token, f"position {position} of {place[1].hex()} was written as {known} and as {token}"
