"""Root of all our exceptions, and the tree of what `schemas` raises.

::

    FleetError                  everything that a package of this project raises on purpose
    └── SchemaError
        ├── InvalidName         a fleet, device or edge name that cannot be one level of a topic
        ├── TopicError          a topic outside the tree
        └── CodecError          bytes that are not a message
            ├── MessageTooLarge     more bytes than the message may have; nothing was decoded
            └── MalformedMessage    within bounds, but not the message it should be
"""

from typing import Self

from pydantic import ValidationError

from schemas.printable import printable_line


class FleetError(Exception):
    """Base of all errors of this project. The message is one sentence for the user."""


class SchemaError(FleetError):
    """Base of all errors of this package."""


class InvalidName(SchemaError, ValueError):  # noqa: N818 - reads as what it says
    """A fleet, device or edge name that cannot be one level of a topic."""


class TopicError(SchemaError, ValueError):
    """A topic outside the tree."""


class CodecError(SchemaError, ValueError):
    """Bytes that are not a message."""


class MessageTooLarge(CodecError):  # noqa: N818
    """A message of `size` bytes, above its `bound`; nothing of it was decoded."""

    def __init__(self, *, size: int, bound: int) -> None:
        super().__init__(f"The message has {size} bytes; at most {bound} are allowed.")
        self.size = size
        self.bound = bound


class MalformedMessage(CodecError):  # noqa: N818
    """A message within bounds that is not what it should be.

    What it quotes of the message cannot begin a new line in a log, nor steer a terminal.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(printable_line(sentence))

    @classmethod
    def from_validation(cls, name: str, error: ValidationError) -> Self:
        """Return the error of the expected message `name`, with pydantic's first finding."""
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "message"
        if first["type"] == "extra_forbidden":
            return cls(f"The {name} has {where[:100]}, which this release does not know: leave it out, or update.")
        # A finding may quote the input, which may be long.
        return cls(f"The {name} is invalid at {where[:100]}: {first['msg'][:200].rstrip('.')}.")
