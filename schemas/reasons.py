"""Reason codes: why a text or a session ends, an Open is refused, a Draft cannot be judged, and what to do about that.

A neighbouring release may send a code, a reason or a number that this one lacks. Its message is sound all the same, so
the value is read as the member of ours that promises least. Only what such a word may look like is read so: text of
another shape, or a number that needs more than a byte, is still no message.
"""

import re
from enum import IntEnum, StrEnum
from typing import Final

from pydantic import BeforeValidator


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

    PROTOCOL = "protocol"
    VOCABULARY = "vocabulary-mismatch"
    PROMPT_EMPTY = "prompt-empty"
    PROMPT_TOO_LONG = "prompt-too-long"
    TOKEN = "token-out-of-vocabulary"  # noqa: S105
    MAX_NEW_TOKENS = "max-new-tokens"
    BUSY = "busy"
    DRAINING = "draining"
    QUOTA = "over-quota"  # of the device, not of the edge: `retry_s` says when it is worth asking again
    LOGPROBS = "logprobs"  # the edge cannot tell them exactly
    FENCED = "fenced"  # the device has misbehaved, or an administrator has shut it out; likewise
    GRAMMAR = "grammar"  # it cannot be read, takes too long, does not fit the text, or is not served here
    OTHER = "other"  # a newer release's, or one that the sentence tells best


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
    QUOTA = "over-quota"
    INTERNAL = "internal"
    OTHER = "other"  # a newer release's; not sent


class Action(StrEnum):
    """What a device does about a fault.

    An action that this release does not know is read as `GIVE_UP`: it cannot be taken.
    """

    RESUME = "resume"  # open again with the tokens committed so far
    WAIT = "wait"  # send the draft again after `retry_s`; nothing is wrong with it
    GIVE_UP = "give-up"


UNKNOWN_NUMBERS: Final = range(256)
"""What a number of an enumeration may be, now or later."""

_WORD: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")


def unknown_as(member: IntEnum | StrEnum) -> BeforeValidator:
    """Return the annotation of an enumeration's field that reads an unknown value as `member`, and coerces none."""
    kind = type(member)
    known = frozenset[object](kind)

    def read(value: object) -> object:
        if isinstance(value, kind):
            return value
        # By themselves, enumerations would take bytes for text, and `true` and 1.0 for 1.
        if type(value) is not (int if issubclass(kind, IntEnum) else str):
            raise ValueError(f"not a {'number' if issubclass(kind, IntEnum) else 'word'}")
        return member if value not in known and _may_be_added(value) else value

    return BeforeValidator(read)


def _may_be_added(value: object) -> bool:
    return _WORD.fullmatch(value) is not None if isinstance(value, str) else value in UNKNOWN_NUMBERS
