"""Event codes: everything that the session log tells as an event, with how grave it is and what it means.

Whoever logs an event takes its kind and its code from here; docs/events.md is this table. A new event is a line here.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from schemas.reasons import FaultCode, RefusalCode


class Severity(StrEnum):
    """How grave an event is."""

    INFO = "info"  # as it should be
    WARNING = "warning"  # something is worse than it should be, and goes on
    ERROR = "error"  # something failed, or was lost


class EventKind(StrEnum):
    """What an event is about."""

    REFUSED = "refused"
    FAULT = "fault"
    QUOTA = "quota"
    DROPPED = "dropped"
    CLOSE = "close"
    ACCEPTANCE = "acceptance"
    GRAMMAR = "grammar"
    FENCE = "fence"
    SESSION = "session"
    DEVICE = "device"
    EDGE = "edge"
    TARGET = "target"
    BROKER = "broker"
    DATABASE = "database"
    CERTIFICATE = "certificate"
    IDENTITY = "identity"
    CONFIG = "config"
    COMMAND = "command"
    ALERT = "alert"
    ROLLOUT = "rollout"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class EventCode:
    """One thing that may happen.

    Attributes:
        kind: What it is about.
        code: What it is, as programs read it; unique within its kind.
        severity: How grave it is, where whoever logs it does not say otherwise.
        meaning: The same for people, in a sentence.
    """

    kind: EventKind
    code: str
    severity: Severity
    meaning: str


_INFO, _WARNING, _ERROR = Severity.INFO, Severity.WARNING, Severity.ERROR
_REFUSALS: Final = {
    RefusalCode.PROTOCOL: (_WARNING, "The device speaks a protocol number that this edge does not."),
    RefusalCode.VOCABULARY: (_WARNING, "Draft and target model have different vocabularies."),
    RefusalCode.PROMPT_EMPTY: (_WARNING, "The prompt was empty."),
    RefusalCode.PROMPT_TOO_LONG: (_WARNING, "Prompt and text do not fit into the target model's context."),
    RefusalCode.TOKEN: (_WARNING, "The prompt held a token that the vocabulary does not have."),
    RefusalCode.MAX_NEW_TOKENS: (_WARNING, "More tokens were asked for than this edge allows."),
    RefusalCode.BUSY: (_WARNING, "The edge, or the device, has as many sessions as it may have."),
    RefusalCode.DRAINING: (_INFO, "The edge is ending, or cannot reach its target model; another one takes the text."),
    RefusalCode.QUOTA: (_WARNING, "The device is over one of its quotas."),
    RefusalCode.LOGPROBS: (_WARNING, "The edge cannot tell the log-probabilities that were asked for."),
    RefusalCode.FENCED: (_WARNING, "The device is shut out."),
    RefusalCode.GRAMMAR: (_WARNING, "The grammar cannot be read, takes too long, or is not served here."),
    RefusalCode.OTHER: (_WARNING, "For a reason that only the sentence tells."),
}
_FAULTS: Final = {
    FaultCode.MALFORMED: (_WARNING, "What came was no message of this protocol."),
    FaultCode.UNKNOWN_SESSION: (_INFO, "A draft named a session that the edge does not have; its device resumes it."),
    FaultCode.DESYNC: (_WARNING, "The device's text and the edge's differ; the device resumes with its own."),
    FaultCode.TOO_LONG: (_WARNING, "The draft was longer than granted."),
    FaultCode.TOKEN: (_WARNING, "The draft held a token that the vocabulary does not have."),
    FaultCode.COUNTS: (_WARNING, "The draft's probabilities cannot be."),
    FaultCode.QUOTA: (_WARNING, "The device writes or asks more than it may."),
    FaultCode.INTERNAL: (_ERROR, "The edge could not verify the draft, and gave the text up."),
    FaultCode.OTHER: (_WARNING, "For a reason that only the sentence tells."),
}

_SESSION, _DEVICE, _EDGE = EventKind.SESSION, EventKind.DEVICE, EventKind.EDGE
_DATABASE, _CONFIG, _COMMAND = EventKind.DATABASE, EventKind.CONFIG, EventKind.COMMAND

EVENT_CODES: Final[tuple[EventCode, ...]] = (
    *(EventCode(EventKind.REFUSED, code.value, *told) for code, told in _REFUSALS.items()),
    *(EventCode(EventKind.FAULT, code.value, *told) for code, told in _FAULTS.items()),
    EventCode(EventKind.QUOTA, "over-quota", _WARNING, "The device sends more than it may, and was told to wait."),
    EventCode(EventKind.DROPPED, "over-quota", _WARNING, "Messages of the device were dropped unread."),
    EventCode(EventKind.CLOSE, "unknown-session", _WARNING, "The device closes more sessions than it can have had."),
    EventCode(EventKind.ACCEPTANCE, "acceptance-collapsed", _WARNING, "Hardly any draft of a session is accepted."),
    EventCode(EventKind.GRAMMAR, "killed", _WARNING, "A grammar ended the process it was compiled or followed in."),
    EventCode(EventKind.FENCE, "fenced", _WARNING, "A device was shut out, by an edge or by the administrator."),
    EventCode(EventKind.FENCE, "lifted", _INFO, "The fences of a device were lifted."),
    EventCode(_SESSION, "resumed", _INFO, "The device opened its session again at the same edge."),
    EventCode(_SESSION, "taken-over", _INFO, "The edge took over a session that another edge, or an earlier run, had."),
    EventCode(_SESSION, "handed-over", _INFO, "The edge gave up sessions that go on elsewhere."),
    EventCode(_SESSION, "lost", _WARNING, "The device was silent for a whole lease; its session ended."),
    EventCode(_SESSION, "failed", _ERROR, "A text ended without being whole; the sentence says why."),
    EventCode(_SESSION, "abandoned", _WARNING, "Sessions that no edge serves any more were closed as lost."),
    EventCode(_DEVICE, "online", _INFO, "The device connected to the broker."),
    EventCode(_DEVICE, "draining", _INFO, "The device ends the texts that it has and takes no others."),
    EventCode(_DEVICE, "offline", _INFO, "The device has disconnected, or the broker has lost it."),
    EventCode(_DEVICE, "silent", _WARNING, "The device says that it is online, and nothing has come of it for long."),
    EventCode(_DEVICE, "heard-again", _INFO, "A device that was silent has been heard."),
    EventCode(_DEVICE, "software-changed", _INFO, "The device runs another release."),
    EventCode(_DEVICE, "model-changed", _INFO, "The device drafts with another model."),
    EventCode(_EDGE, "started", _INFO, "The edge takes sessions."),
    EventCode(_EDGE, "draining", _INFO, "The edge takes no new sessions and ends when the open ones have."),
    EventCode(_EDGE, "stopped", _INFO, "The edge has ended as it was told to."),
    EventCode(_EDGE, "ended-unexpectedly", _ERROR, "An earlier run of the edge ended without saying so."),
    EventCode(_EDGE, "software-changed", _INFO, "The edge runs another release than before."),
    EventCode(_EDGE, "target-changed", _INFO, "The edge verifies with another target model than before."),
    EventCode(_EDGE, "hangs", _ERROR, "The edge's loop has made no step for long."),
    EventCode(_EDGE, "hangs-no-more", _INFO, "The edge's loop makes steps again."),
    EventCode(_EDGE, "inbox-full", _WARNING, "More came than the edge could take; messages were dropped."),
    EventCode(_EDGE, "job-failed", _ERROR, "A recurring job of the edge failed; it is tried again."),
    EventCode(EventKind.TARGET, "target-away", _ERROR, "What computes the target model cannot be reached."),
    EventCode(EventKind.TARGET, "target-back", _INFO, "The target model is back."),
    EventCode(EventKind.TARGET, "step-failed", _ERROR, "The target model could not compute a step."),
    EventCode(EventKind.BROKER, "connection-lost", _WARNING, "The edge has lost the broker."),
    EventCode(EventKind.BROKER, "connection-back", _INFO, "The edge has reached the broker again."),
    EventCode(EventKind.BROKER, "state-rejected", _ERROR, "The broker does not let the edge say that it is there."),
    EventCode(_DATABASE, "away", _WARNING, "The session log's database does not answer; records wait in the spool."),
    EventCode(_DATABASE, "back", _INFO, "The database answers again, and takes what waited."),
    EventCode(_DATABASE, "refuses", _ERROR, "The database does not take records until somebody changes something."),
    EventCode(_DATABASE, "record-refused", _ERROR, "The database can never take a record; it was left out."),
    EventCode(_DATABASE, "records-lost", _ERROR, "Memory and spool were full: records were lost."),
    EventCode(_DATABASE, "purged", _INFO, "What was older than it is kept was deleted."),
    EventCode(_DEVICE, "clock-wrong", _WARNING, "A device's clock is ahead of the edge's, or has gone back."),
    EventCode(EventKind.CERTIFICATE, "ends-soon", _WARNING, "A certificate ends soon and was not renewed."),
    EventCode(EventKind.CERTIFICATE, "ended", _ERROR, "A certificate has ended."),
    EventCode(EventKind.IDENTITY, "revoked", _WARNING, "A machine's certificate was revoked."),
    EventCode(_CONFIG, "wanted", _INFO, "The administrator has set what devices are to run with."),
    EventCode(_CONFIG, "applied", _INFO, "A device runs with what is wanted of it."),
    EventCode(_CONFIG, "refused", _WARNING, "A device does not take what is wanted of it, and says why."),
    EventCode(_COMMAND, "done", _INFO, "A device has done a command."),
    EventCode(_COMMAND, "refused", _WARNING, "A device does not do a command, and says why."),
    EventCode(_COMMAND, "failed", _WARNING, "A device could not do a command."),
    EventCode(_COMMAND, "timed-out", _WARNING, "No answer to a command came in time."),
    EventCode(EventKind.ALERT, "opened", _WARNING, "An alert's rule is met."),
    EventCode(EventKind.ALERT, "acknowledged", _INFO, "Somebody has taken note of an alert."),
    EventCode(EventKind.ALERT, "cleared", _INFO, "An alert's rule is met no more, or somebody has cleared it."),
    EventCode(EventKind.ROLLOUT, "proven", _INFO, "A release was rolled out to a machine, or back, and is proven."),
    EventCode(EventKind.ROLLOUT, "unchanged", _INFO, "A machine ran the release already that was rolled out."),
    EventCode(EventKind.ROLLOUT, "went-back", _ERROR, "A release failed its proof; the one before runs again."),
    EventCode(EventKind.ROLLOUT, "failed", _ERROR, "A roll-out failed, and nobody has proven what runs now."),
    EventCode(EventKind.ROLLOUT, "untouched", _WARNING, "A roll-out stopped before it came to a machine."),
    EventCode(EventKind.ROLLOUT, "removed", _INFO, "The fleet was taken off a machine."),
    EventCode(EventKind.OTHER, "other", _WARNING, "More kinds of event came in a minute than are told apart."),
)

_SEVERITIES: Final = {(each.kind.value, each.code): each.severity for each in EVENT_CODES}


def severity_of(kind: str, code: str) -> Severity:
    """Return how grave an event is; one that the table lacks is one to look at."""
    return _SEVERITIES.get((kind, code), Severity.WARNING)
