"""The exception tree of the device.

::

    DeviceError
    ├── ConfigurationError      a setting that cannot work
    ├── EdgeUnavailable         no edge answers
    ├── SessionRefused          the edge declined the Open
    ├── SessionFailed           the session cannot go on
    └── ProtocolViolation       the edge answered something that no correct edge answers

    DrafterError (fleet_device.drafter) stands beside it: the draft model's own failures.
"""

from schemas.messages import RefusalCode

__all__ = [
    "ConfigurationError",
    "DeviceError",
    "EdgeUnavailable",
    "ProtocolViolation",
    "SessionFailed",
    "SessionRefused",
]


class DeviceError(Exception):
    """Base of all errors of this package. Its text is one sentence for the user."""


class ConfigurationError(DeviceError):
    """A setting that cannot work."""


class EdgeUnavailable(DeviceError):  # noqa: N818 - reads as what it says
    """No edge answers."""


class SessionRefused(DeviceError):  # noqa: N818
    """The edge declined the Open.

    Attributes:
        code: Why.
    """

    def __init__(self, code: RefusalCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class SessionFailed(DeviceError):  # noqa: N818
    """The session cannot go on."""


class ProtocolViolation(DeviceError):  # noqa: N818
    """The edge answered something that no correct edge answers."""
