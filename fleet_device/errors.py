"""Exception tree of the device.

::

    DeviceError
    ├── ConfigurationError      a setting that cannot work
    ├── EdgeUnavailable         no edge answers
    ├── SessionRefused          the edge declined the Open, or to go on
    ├── SessionFailed           the session cannot go on
    ├── InvalidRequest          a prompt or an option that cannot be used
    ├── PromptTooLong           the draft model has no room for it
    ├── TextQueueFull           too many texts are waiting
    ├── TextCancelled           given up before its end
    ├── DeviceClosed            the device is not open
    └── ProtocolViolation       the edge answered something that no correct edge answers

    DrafterError (fleet_device.drafters.contract) stands beside it: the draft model's own failures.
"""

import re
from typing import Final

from schemas.errors import FleetError
from schemas.reasons import RefusalCode

_TIME: Final = re.compile(r"\d s\b")
_LONGEST_S: Final = 1e9


class DeviceError(FleetError):
    """Base of all errors of this package. Its text is one sentence for the user."""


class ConfigurationError(DeviceError):
    """A setting that cannot work."""


class EdgeUnavailable(DeviceError):  # noqa: N818 - reads as what it says
    """No edge answers.

    Attributes:
        code: Why, for programs: a `LinkFault` where it is the broker's connection.
    """

    def __init__(self, sentence: str, *, code: str = "edge_unavailable") -> None:
        super().__init__(sentence)
        self.code = code


class SessionRefused(DeviceError):  # noqa: N818
    """The edge declined the Open, or to go on.

    Attributes:
        code: Why.
        retry_s: Seconds after which it is worth asking again, which the sentence names too; None if that is not known.
    """

    def __init__(self, code: RefusalCode, sentence: str, *, retry_s: float | None = None) -> None:
        if retry_s is not None and not _TIME.search(sentence):
            sentence = f"{sentence} Ask again in {min(retry_s, _LONGEST_S):.0f} s.".lstrip()
        super().__init__(sentence)
        self.code = code
        self.retry_s = retry_s


class SessionFailed(DeviceError):  # noqa: N818
    """The session cannot go on."""


class ProtocolViolation(DeviceError):  # noqa: N818
    """The edge answered something that no correct edge answers."""


class InvalidRequest(DeviceError, ValueError):  # noqa: N818
    """A prompt or an option that cannot be used."""


class PromptTooLong(DeviceError):  # noqa: N818
    """The draft model has no room for the prompt and a text."""


class TextQueueFull(DeviceError):  # noqa: N818
    """Too many texts are waiting.

    Attributes:
        retry_after_s: When it is worth asking again.
    """

    def __init__(self, waiting: int, *, at_once: int = 1, retry_after_s: int) -> None:
        writes = "one" if at_once == 1 else str(at_once)
        super().__init__(
            f"{waiting} texts are waiting already and the device writes {writes} at a time; try again in "
            f"{retry_after_s} s."
        )
        self.retry_after_s = retry_after_s


class TextCancelled(DeviceError):  # noqa: N818
    """A text was given up before its end: its reader has gone, or the device shuts down."""


class DeviceClosed(DeviceError):  # noqa: N818
    """The device is not open."""
