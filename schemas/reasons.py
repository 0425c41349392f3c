"""Reasons: why a text or a session ends, an Open is refused, a Draft cannot be judged, and what to do about that."""

from enum import IntEnum, StrEnum

__all__ = ["Action", "EndReason", "FaultCode", "Finish", "RefusalCode"]


class Finish(IntEnum):
    """Why the edge ends the text with this verdict.

    An end that this release does not know is read as `LENGTH`: the text ends there, and is not said to be complete.
    """

    NO = 0
    STOP = 1  # the target drew an end-of-sequence token
    LENGTH = 2  # max_new_tokens reached


class EndReason(StrEnum):
    """How a session ended.

    An end that this release does not know is read as `FAILED`: it is not counted as a success.
    """

    STOP = "stop"  # end of sequence, or the application's stop string
    LENGTH = "length"
    CANCELLED = "cancelled"  # the application, or the device shutting down
    LOST = "lost"  # the lease ran out
    FAILED = "failed"  # a fault that cannot be resumed


class RefusalCode(StrEnum):
    """Why an Open was refused.

    A reason that this release does not know is read as `OTHER`: the device shows the sentence and does not try again.
    """

    MALFORMED = "malformed"
    PROTOCOL = "protocol"
    VOCABULARY = "vocabulary-mismatch"
    PROMPT_EMPTY = "prompt-empty"
    PROMPT_TOO_LONG = "prompt-too-long"
    TOKEN = "token-out-of-vocabulary"  # noqa: S105
    MAX_NEW_TOKENS = "max-new-tokens"
    BUSY = "busy"
    DRAINING = "draining"
    OTHER = "other"  # a newer release's; not sent


class FaultCode(StrEnum):
    """What was wrong with a Draft.

    A reason that this release does not know is read as `OTHER`: the device follows the action that came with it.
    """

    MALFORMED = "malformed"
    UNKNOWN_SESSION = "unknown-session"
    DESYNC = "desync"
    TOO_LONG = "draft-too-long"
    TOKEN = "token-out-of-vocabulary"  # noqa: S105
    COUNTS = "counts"
    ROUND = "round"
    INTERNAL = "internal"
    OTHER = "other"  # a newer release's; not sent


class Action(StrEnum):
    """What a device does about a fault.

    An action that this release does not know is read as `GIVE_UP`: it cannot be taken.
    """

    RESUME = "resume"  # open again with the tokens committed so far
    GIVE_UP = "give-up"
