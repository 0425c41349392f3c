"""Exception tree of the device.

::

    DeviceError
    ├── ConfigurationError      a setting that cannot work
    ├── EdgeUnavailable         no edge answers
    ├── SessionRefused          the edge refused the Open, or to continue
    ├── SessionFailed           the session has failed
    ├── InvalidRequest          a prompt or an option that cannot be used
    ├── PromptTooLong           a chat's context has no room for it
    ├── RequestQueueFull        too many requests are waiting
    ├── RequestTimeout          it was not complete in time
    ├── TextCancelled           cancelled before its end
    ├── DeviceClosed            the device is not open
    └── ProtocolViolation       the edge answered something that no correct edge answers

    DrafterError (fleet_device.drafters.contract) is separate: failures of the draft model.
"""

import re
from typing import Final

from schemas.errors import FleetError
from schemas.reasons import RefusalCode

_TIME: Final = re.compile(r"\d s\b")
_LONGEST_S: Final = 1e9


class DeviceError(FleetError):
    """Base of all errors of this package; one sentence for the user."""


class ConfigurationError(DeviceError): ...


class EdgeUnavailable(DeviceError):  # noqa: N818 - reads as what it says
    """No edge answers.

    Attributes:
        code: Why, for programs: a `LinkFault` if it is the connection to the broker.
    """

    def __init__(self, sentence: str, *, code: str = "edge_unavailable") -> None:
        super().__init__(sentence)
        self.code = code


class SessionRefused(DeviceError):  # noqa: N818
    """The edge refused the Open, or to continue.

    Attributes:
        retry_s: Seconds after which it is worth asking again, also in the sentence; None if unknown.
    """

    def __init__(self, code: RefusalCode, sentence: str, *, retry_s: float | None = None) -> None:
        if retry_s is not None and not _TIME.search(sentence):
            sentence = f"{sentence} Ask again in {min(retry_s, _LONGEST_S):.0f} s.".lstrip()
        super().__init__(sentence)
        self.code = code
        self.retry_s = retry_s


class SessionFailed(DeviceError): ...  # noqa: N818


class ProtocolViolation(DeviceError): ...  # noqa: N818


class InvalidRequest(DeviceError):  # noqa: N818
    """A prompt, an option or a parameter cannot be used. No ValueError, which pydantic would turn into one of its own.

    Attributes:
        param: Name of the parameter, if it is one.
        code: Code in the HTTP API, if OpenAI has one.
    """

    def __init__(self, sentence: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(sentence)
        self.param = param
        self.code = code


class PromptTooLong(DeviceError): ...  # noqa: N818


class RequestQueueFull(DeviceError):  # noqa: N818
    """Too many requests are waiting; try again after `retry_after_s` seconds."""

    def __init__(self, waiting: int, *, at_once: int = 1, retry_after_s: int) -> None:
        runs = "one" if at_once == 1 else str(at_once)
        super().__init__(
            f"{waiting} requests are waiting already and the device runs {runs} at a time; try again in "
            f"{retry_after_s} s."
        )
        self.retry_after_s = retry_after_s


class RequestTimeout(DeviceError, TimeoutError):  # noqa: N818
    """A request was not complete within the caller's timeout, and is cancelled."""


class TextCancelled(DeviceError):  # noqa: N818
    """A request was cancelled: its reader has gone, or the device shuts down."""


class DeviceClosed(DeviceError): ...  # noqa: N818
