"""Reason codes: why a request or session ends, an Open is refused, a Draft is rejected as faulty, and what to do.

A peer of another release may send a value that this release lacks. It is read as the member of ours that promises
least. Only values that could be members are read so: other text, or a number of more than a byte, is an invalid
message.
"""

import re
from enum import IntEnum, StrEnum
from typing import Final

from pydantic import BeforeValidator


class Finish(IntEnum):
    """Why the generation ends with this verdict. An unknown value is read as `LENGTH`: it ends, maybe incomplete."""

    NO = 0
    STOP = 1  # the target drew an end-of-sequence token
    LENGTH = 2  # max_new_tokens reached


class EndReason(StrEnum):
    """How a session ended. An unknown value is read as `FAILED`: it does not count as a success."""

    STOP = "stop"  # end of sequence, or the application's stop string
    LENGTH = "length"
    CANCELLED = "cancelled"  # the application, or the device shutting down
    LOST = "lost"  # the lease ran out
    FAILED = "failed"  # a fault that cannot be resumed


class RefusalCode(StrEnum):
    """Why an Open was refused.

    An unknown value is read as `OTHER`: the device shows the sentence and does not try again.
    """

    PROTOCOL = "protocol"
    VOCABULARY = "vocabulary-mismatch"
    PROMPT_EMPTY = "prompt-empty"
    PROMPT_TOO_LONG = "prompt-too-long"
    TOKEN = "token-out-of-vocabulary"  # noqa: S105
    MAX_NEW_TOKENS = "max-new-tokens"
    BUSY = "busy"
    DRAINING = "draining"
    QUOTA = "over-quota"  # of the device, not of the edge; see `retry_s`
    LOGPROBS = "logprobs"  # the edge cannot compute them exactly
    QUARANTINED = "quarantined"  # for misbehaviour or by an administrator; see `retry_s`
    OTHER_TARGET = "other-target"  # the request is for another target model
    TOO_LATE = "too-late"  # the first token would come after the request's time; see `retry_s`
    GRAMMAR = "grammar"  # invalid, too expensive, violated by the resumed tokens, or unsupported
    OTHER = "other"  # of a newer release, or explained by the sentence only


class FaultCode(StrEnum):
    """What was wrong with a Draft.

    An unknown value is read as `OTHER`: the device follows the action that came with it.
    """

    MALFORMED = "malformed"
    UNKNOWN_SESSION = "unknown-session"
    TOKENS_DIFFER = "tokens-differ"
    TOO_LONG = "draft-too-long"
    TOKEN = "token-out-of-vocabulary"  # noqa: S105
    COUNTS = "counts"
    QUOTA = "over-quota"
    INTERNAL = "internal"
    OTHER = "other"  # of a newer release; not sent


class Action(StrEnum):
    """What a device does about a fault. An unknown value is read as `GIVE_UP`."""

    RESUME = "resume"  # open again with the tokens committed so far
    WAIT = "wait"  # send the draft again after `retry_s`; it is valid
    GIVE_UP = "give-up"


UNKNOWN_NUMBERS: Final = range(256)
"""Valid numbers of enumerations, in this and in newer releases."""

_WORD: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")


def unknown_as(member: IntEnum | StrEnum) -> BeforeValidator:
    """Return the annotation of an enumeration field that reads unknown values as `member`, and coerces nothing."""
    kind = type(member)
    known = frozenset[object](kind)

    def read(value: object) -> object:
        if isinstance(value, kind):
            return value
        # pydantic would accept bytes for text, and `true` and 1.0 for 1.
        if type(value) is not (int if issubclass(kind, IntEnum) else str):
            raise ValueError(f"not a {'number' if issubclass(kind, IntEnum) else 'word'}")
        return member if value not in known and _may_be_added(value) else value

    return BeforeValidator(read)


def _may_be_added(value: object) -> bool:
    return _WORD.fullmatch(value) is not None if isinstance(value, str) else value in UNKNOWN_NUMBERS
