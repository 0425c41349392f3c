"""Exceptions of broker configuration and of throw-away brokers.

::

    BrokerError
    ├── BrokerMissing     the broker's program is not installed
    ├── BrokerFailed      it does not start
    └── BrokerFilesError  a file of a broker cannot be read, written or used
"""

from schemas.errors import FleetError


class BrokerError(FleetError):
    """Base of all errors of this package. Its text is one sentence for the user."""


class BrokerMissing(BrokerError):  # noqa: N818 - reads as what it says
    """The broker's program is not installed."""


class BrokerFailed(BrokerError):  # noqa: N818
    """The broker does not start."""


class BrokerFilesError(BrokerError):
    """A file of a broker cannot be read, written or used."""
