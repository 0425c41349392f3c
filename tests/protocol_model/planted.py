"""Planted faults that the model must find: each is a line of the protocol that an implementation may forget."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from typing import Any, Final
from unittest.mock import patch

from fleet_device.session.machine import DeviceSession
from fleet_device.session.sequence import DraftsInFlight, EdgeOnlyDecoding, TokenSequence
from fleet_edge import handlers
from fleet_edge.answers.answers import Responder
from fleet_edge.handlers import MessageHandlers
from fleet_edge.sessions.admission import SessionLimits
from fleet_edge.sessions.drafts import ReceivedDraft, Rounds
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.sessions.table import SessionTable
from schemas.messages import Draft, Open, Verdict
from schemas.reasons import FaultCode


class Planted(StrEnum):
    """Planted faults.

    Attributes:
        EPOCH: The edge accepts drafts that a rejection has voided.
        REPEAT: The edge judges a repeated draft again.
        HANDLE: The edge gives a free handle to the next session at once.
        START: Every edge begins to count its handles at 0.
        ORPHAN: The edge keeps what it has computed for a session that was resumed.
        ROUND: The device applies a verdict to its oldest draft, whatever round it names.
        TWICE: The device applies repeated verdicts.
        STALE: The device accepts verdicts of any handle: of other sessions and of edges that it has left.
        RESUME: The device omits the last token when it resumes.
        FIX: The device draws a correction and does not send it to the edge.
        OWNER: The edge finds a session by its name alone, whichever device asks.
        GAP: The device appends edge-only tokens without checking their position.
        REPEATS_STRUCK: The edge counts a repeated draft against its device.
        FOREIGN: The edge resumes tokens of another target.
        UNNAMED: The device does not name the target when it resumes, and takes any grant.
        UNMARKED: The device does not mark the tokens of another target.
    """

    EPOCH = "epoch"
    REPEAT = "repeat"
    HANDLE = "handle"
    START = "start"
    ORPHAN = "orphan"
    ROUND = "round"
    TWICE = "twice"
    STALE = "stale"
    RESUME = "resume"
    FIX = "fix"
    OWNER = "owner"
    GAP = "gap"
    REPEATS_STRUCK = "repeats-struck"
    FOREIGN = "foreign"
    UNNAMED = "unnamed"
    UNMARKED = "unmarked"


def _admit_any_epoch(self: EdgeSession, arrived: ReceivedDraft) -> Any:
    return _admit(self, replace(arrived, draft=arrived.draft.model_copy(update={"epoch": self._epoch})))


def _free_handle(self: SessionTable) -> int:
    return next(handle for handle in range(1 << 16) if handle not in self._by_handle)


def _count_from_0(self: SessionTable) -> None:
    self._next = 0


def _keep_as_oldest(self: DraftsInFlight, verdict: Verdict) -> None:
    if self._sent:
        self._early[self._sent[0].draft.round] = verdict


def _on_verdict_twice(self: DeviceSession, verdict: Verdict) -> Any:
    before = list(self._drafts._sent)
    effects = _on_verdict(self, verdict)
    if effects and self.ended is None and not self._drafts._sent and self._rejection is None:
        self._drafts._sent.extend(before)
    return effects


def _on_any_verdict(self: DeviceSession, verdict: Verdict) -> Any:
    if self.opened is not None:
        verdict = verdict.model_copy(update={"handle": self.opened.handle})
    return _on_verdict(self, verdict)


def _resume_short(self: DeviceSession, **options: Any) -> Open:
    asked = _open(self, **options)
    self._asking = asked.model_copy(update={"resume": asked.resume and asked.resume[:-1]})
    return self._asking


def _send_without_fix(self: DeviceSession, **options: Any) -> Draft:
    self._fix = None
    return _send(self, **options)


def _by_name_alone(self: SessionTable, device: str, session: bytes) -> EdgeSession | None:
    del device
    return next((each for each in self if each.session == session), None)


def _apply_anywhere(self: DeviceSession, verdict: Verdict, decoding: EdgeOnlyDecoding) -> Any:
    return _apply_edge_only(self, verdict.model_copy(update={"base": len(self.committed)}), decoding)


def _repeat_verdict_struck(self: Responder, session: EdgeSession, draft: Draft, payload: bytes) -> None:
    for _ in range(20):
        self.guard.strike(session.device, _MALFORMED)
    _again(self, session, draft, payload)


def _grant_any(message: Open, **options: Any) -> SessionLimits:
    return _grant(message.model_copy(update={"target_id": None}), **options)


def _close_and_keep(self: MessageHandlers, session: EdgeSession) -> None:
    self.sessions.remove(session)


_MALFORMED: Final = FaultCode.MALFORMED
_admit, _on_verdict, _open = EdgeSession.admit, DeviceSession.on_verdict, DeviceSession.open
_send, _again = DeviceSession.finish_draft, Responder.repeat_verdict
_apply_edge_only = DeviceSession._apply_edge_only
_grant = handlers.grant


_REPLACED: Final[dict[Planted, tuple[tuple[Any, str, Any], ...]]] = {
    Planted.EPOCH: ((EdgeSession, "admit", _admit_any_epoch),),
    Planted.REPEAT: (
        (Rounds, "verdict", lambda _self, _round: None),
        (Rounds, "passed", lambda _self, _round: False),
    ),
    Planted.HANDLE: ((SessionTable, "_free_handle", _free_handle),),
    Planted.START: ((SessionTable, "__post_init__", _count_from_0),),
    Planted.ORPHAN: ((MessageHandlers, "_forget", _close_and_keep),),
    Planted.ROUND: ((DraftsInFlight, "keep_verdict", _keep_as_oldest),),
    Planted.TWICE: ((DeviceSession, "on_verdict", _on_verdict_twice),),
    Planted.STALE: ((DeviceSession, "on_verdict", _on_any_verdict),),
    Planted.RESUME: ((DeviceSession, "open", _resume_short),),
    Planted.FIX: ((DeviceSession, "finish_draft", _send_without_fix),),
    Planted.OWNER: ((SessionTable, "by_name", _by_name_alone),),
    Planted.GAP: ((DeviceSession, "_apply_edge_only", _apply_anywhere),),
    Planted.FOREIGN: ((handlers, "grant", _grant_any),),
    Planted.UNNAMED: ((DeviceSession, "wanted_target", None),),
    Planted.UNMARKED: ((TokenSequence, "leave_target", lambda _self: None),),
    Planted.REPEATS_STRUCK: ((Responder, "repeat_verdict", _repeat_verdict_struck),),
}


@contextmanager
def planted(kind: Planted) -> Iterator[None]:
    patches = [patch.object(owner, name, replacement) for owner, name, replacement in _REPLACED[kind]]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()
