"""The exception tree of the words: everything that `schemas` raises.

::

    SchemaError
    ├── InvalidName         a fleet, device or edge name that cannot be one level of a topic
    ├── TopicError          a topic outside the tree
    └── CodecError          bytes that are not a message
        ├── MessageTooLarge     more bytes than the message may have; nothing was decoded
        └── MalformedMessage    within bounds, but not the message it should be
"""

__all__ = [
    "CodecError",
    "InvalidName",
    "MalformedMessage",
    "MessageTooLarge",
    "SchemaError",
    "TopicError",
]


class SchemaError(Exception):
    """Base of all errors of this package. Its text is one sentence for the user."""


class InvalidName(SchemaError, ValueError):  # noqa: N818 - reads as what it says
    """A fleet, device or edge name that cannot be one level of a topic."""


class TopicError(SchemaError, ValueError):
    """A topic outside the tree."""


class CodecError(SchemaError, ValueError):
    """Bytes that are not a message."""


class MessageTooLarge(CodecError):  # noqa: N818
    """A message above its bound; nothing of it was decoded.

    Attributes:
        size: Bytes received.
        bound: Bytes allowed.
    """

    def __init__(self, *, size: int, bound: int) -> None:
        super().__init__(f"The message has {size} bytes; at most {bound} are allowed.")
        self.size = size
        self.bound = bound


class MalformedMessage(CodecError):  # noqa: N818
    """A message within bounds that is not what it should be."""
