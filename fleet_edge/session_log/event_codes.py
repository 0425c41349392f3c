"""Event codes: all events of the session log, with severity and meaning.

Every event takes its kind and code from here; docs/events.md is this table. To add an event, add a line here.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from schemas.reasons import FaultCode, RefusalCode


class Severity(StrEnum):
    INFO = "info"  # as it should be
    WARNING = "warning"  # something is worse than it should be, and goes on
    ERROR = "error"  # something failed, or was lost


class EventKind(StrEnum):
    REFUSED = "refused"
    FAULT = "fault"
    QUOTA = "quota"
    DROPPED = "dropped"
    CLOSE = "close"
    ACCEPTANCE = "acceptance"
    GRAMMAR = "grammar"
    QUARANTINE = "quarantine"
    SESSION = "session"
    DEVICE = "device"
    EDGE = "edge"
    TARGET = "target"
    BROKER = "broker"
    DATABASE = "database"
    IDENTITY = "identity"
    CONFIG = "config"
    COMMAND = "command"
    ALERT = "alert"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class EventCode:
    """A kind of event: `code` is unique within `kind`, `severity` the default, `meaning` a sentence for people."""

    kind: EventKind
    code: str
    severity: Severity
    meaning: str


_INFO, _WARNING, _ERROR = Severity.INFO, Severity.WARNING, Severity.ERROR
_REFUSALS: Final = {
    RefusalCode.PROTOCOL: (_WARNING, "The device speaks a protocol number that this edge does not."),
    RefusalCode.VOCABULARY: (_WARNING, "Draft and target model have different vocabularies."),
    RefusalCode.PROMPT_EMPTY: (_WARNING, "The prompt was empty."),
    RefusalCode.PROMPT_TOO_LONG: (_WARNING, "Prompt and output do not fit into the target model's context."),
    RefusalCode.TOKEN: (_WARNING, "The prompt contains a token that is not in the vocabulary."),
    RefusalCode.MAX_NEW_TOKENS: (_WARNING, "The request asks for more tokens than this edge allows."),
    RefusalCode.BUSY: (_WARNING, "The edge or the device has its maximum number of sessions."),
    RefusalCode.DRAINING: (
        _INFO,
        "The edge is stopping, or cannot reach its target model; another one takes the request.",
    ),
    RefusalCode.QUOTA: (_WARNING, "The device is over one of its quotas."),
    RefusalCode.LOGPROBS: (_WARNING, "The edge cannot return the requested log-probabilities."),
    RefusalCode.QUARANTINED: (_WARNING, "The device is quarantined."),
    RefusalCode.GRAMMAR: (_WARNING, "The grammar cannot be read, takes too long, or is not served here."),
    RefusalCode.TOO_LATE: (_INFO, "The first token would come after the time that the application allows."),
    RefusalCode.OTHER_TARGET: (_INFO, "The request is for another target model, for whose edge it waits."),
    RefusalCode.OTHER: (_WARNING, "Another reason; see the sentence."),
}
_FAULTS: Final = {
    FaultCode.MALFORMED: (_WARNING, "The message does not follow the protocol."),
    FaultCode.UNKNOWN_SESSION: (_INFO, "A draft named a session that the edge does not know; the device resumes it."),
    FaultCode.TOKENS_DIFFER: (_WARNING, "Device and edge have different tokens; the device resumes with its own."),
    FaultCode.TOO_LONG: (_WARNING, "The draft was longer than granted."),
    FaultCode.TOKEN: (_WARNING, "The draft contains a token that is not in the vocabulary."),
    FaultCode.COUNTS: (_WARNING, "The draft's probabilities are impossible."),
    FaultCode.QUOTA: (_WARNING, "The device generates or asks for more than it may."),
    FaultCode.INTERNAL: (_ERROR, "The edge could not verify the draft and ended the session."),
    FaultCode.OTHER: (_WARNING, "Another reason; see the sentence."),
}

_SESSION, _DEVICE, _EDGE = EventKind.SESSION, EventKind.DEVICE, EventKind.EDGE
_DATABASE, _CONFIG, _COMMAND = EventKind.DATABASE, EventKind.CONFIG, EventKind.COMMAND

EVENT_CODES: Final[tuple[EventCode, ...]] = (
    *(EventCode(EventKind.REFUSED, code.value, *entry) for code, entry in _REFUSALS.items()),
    *(EventCode(EventKind.FAULT, code.value, *entry) for code, entry in _FAULTS.items()),
    EventCode(EventKind.QUOTA, "over-quota", _WARNING, "The device sends more than it may, and was asked to wait."),
    EventCode(EventKind.DROPPED, "over-quota", _WARNING, "Messages of the device were dropped without being read."),
    EventCode(EventKind.CLOSE, "unknown-session", _WARNING, "The device closes more sessions than it can have opened."),
    EventCode(EventKind.ACCEPTANCE, "acceptance-collapsed", _WARNING, "Almost no draft of a session is accepted."),
    EventCode(EventKind.GRAMMAR, "killed", _WARNING, "A grammar ended its processes."),
    EventCode(EventKind.QUARANTINE, "begun", _WARNING, "A device was quarantined by an edge or by the administrator."),
    EventCode(EventKind.QUARANTINE, "lifted", _INFO, "The quarantine of a device was lifted."),
    EventCode(_SESSION, "resumed", _INFO, "The device opened its session again at the same edge."),
    EventCode(_SESSION, "taken-over", _INFO, "The edge took over a session of another edge, or of an earlier run."),
    EventCode(_SESSION, "handed-over", _INFO, "Sessions of the edge were migrated."),
    EventCode(_SESSION, "lost", _WARNING, "The device was silent for a whole lease; its session ended."),
    EventCode(_SESSION, "failed", _ERROR, "A request failed; the sentence says why."),
    EventCode(_SESSION, "abandoned", _WARNING, "Sessions that no edge serves were closed as lost."),
    EventCode(_DEVICE, "online", _INFO, "The device connected to the broker."),
    EventCode(_DEVICE, "draining", _INFO, "The device finishes its requests and accepts no others."),
    EventCode(_DEVICE, "offline", _INFO, "The device has disconnected, or the broker has lost it."),
    EventCode(_DEVICE, "closed", _INFO, "The device's program has ended as intended."),
    EventCode(_DEVICE, "software-changed", _INFO, "The device runs another release."),
    EventCode(_DEVICE, "model-changed", _INFO, "The device drafts with another model."),
    EventCode(_EDGE, "started", _INFO, "The edge accepts sessions."),
    EventCode(_EDGE, "draining", _INFO, "The edge accepts no new sessions and stops when the open ones have ended."),
    EventCode(_EDGE, "stopped", _INFO, "The edge has stopped as requested."),
    EventCode(_EDGE, "ended-unexpectedly", _ERROR, "An earlier run of the edge ended unexpectedly."),
    EventCode(_EDGE, "software-changed", _INFO, "The edge runs another release than before."),
    EventCode(_EDGE, "target-changed", _INFO, "The edge verifies with another target model than before."),
    EventCode(_EDGE, "hangs", _ERROR, "The edge's loop has made no step for a long time."),
    EventCode(_EDGE, "hangs-no-more", _INFO, "The edge's loop makes steps again."),
    EventCode(_EDGE, "inbox-full", _WARNING, "The inbox was full; messages were dropped."),
    EventCode(_EDGE, "job-failed", _ERROR, "A recurring job of the edge failed and will be repeated."),
    EventCode(_EDGE, "clock-stepped", _WARNING, "The clock of the edge's machine was set forward or back."),
    EventCode(EventKind.TARGET, "target-away", _ERROR, "The inference servers of the target model cannot be reached."),
    EventCode(EventKind.TARGET, "target-back", _INFO, "The target model is available again."),
    EventCode(EventKind.TARGET, "step-failed", _ERROR, "The target model could not compute a step."),
    EventCode(EventKind.BROKER, "connection-lost", _WARNING, "The edge has lost the broker."),
    EventCode(EventKind.BROKER, "connection-back", _INFO, "The edge has reached the broker again."),
    EventCode(EventKind.BROKER, "state-rejected", _ERROR, "The broker refuses the edge's state."),
    EventCode(_DATABASE, "away", _WARNING, "The session log's database does not answer; records wait in the spool."),
    EventCode(_DATABASE, "back", _INFO, "The database answers again and stores the waiting records."),
    EventCode(_DATABASE, "refuses", _ERROR, "The database refuses records until an administrator intervenes."),
    EventCode(_DATABASE, "record-refused", _ERROR, "The database can never store a record; it was skipped."),
    EventCode(_DATABASE, "records-lost", _ERROR, "Memory and spool were full: records were lost."),
    EventCode(_DATABASE, "purged", _INFO, "Records beyond their retention were deleted."),
    EventCode(
        _DATABASE, "clock-in-doubt", _WARNING, "The clock of the edge's machine disagrees with the log or the database."
    ),
    EventCode(EventKind.IDENTITY, "revoked", _WARNING, "A machine's certificate was revoked."),
    EventCode(EventKind.IDENTITY, "suspended", _WARNING, "The broker refuses a machine until that is lifted."),
    EventCode(EventKind.IDENTITY, "unsuspended", _INFO, "The suspension of a machine was lifted."),
    EventCode(EventKind.IDENTITY, "disconnected", _INFO, "The administrator has ended a machine's connection."),
    EventCode(EventKind.IDENTITY, "not-changed", _WARNING, "A change of a machine's access is not in force."),
    EventCode(_CONFIG, "wanted", _INFO, "The administrator has changed settings of devices."),
    EventCode(_CONFIG, "applied", _INFO, "A device has applied its settings."),
    EventCode(_CONFIG, "refused", _WARNING, "A device refuses its settings, and says why."),
    EventCode(_COMMAND, "done", _INFO, "A device has executed a command."),
    EventCode(_COMMAND, "refused", _WARNING, "A device refuses a command, and says why."),
    EventCode(_COMMAND, "failed", _WARNING, "A device failed to execute a command."),
    EventCode(_COMMAND, "timed-out", _WARNING, "No answer to a command came in time."),
    EventCode(EventKind.ALERT, "opened", _WARNING, "An alert's rule is met."),
    EventCode(EventKind.ALERT, "cleared", _INFO, "An alert's rule is no longer met."),
    EventCode(
        EventKind.OTHER, "other", _WARNING, "Events of a minute beyond the number of kinds that are counted separately."
    ),
)

_SEVERITIES: Final = {(each.kind.value, each.code): each.severity for each in EVENT_CODES}


def severity_of(kind: str, code: str) -> Severity:
    """Return the severity of an event; one that the table lacks is a warning."""
    return _SEVERITIES.get((kind, code), Severity.WARNING)
