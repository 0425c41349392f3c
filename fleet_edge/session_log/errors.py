"""Exception tree of the session log.

::

    StoreError                  an error that the operator has to fix
    ├── StoreUnavailable        the database does not answer now; the same call may succeed later
    │   └── StoreRefused        it answers, and fails until an operator acts
    ├── RecordRejected          the database answers, and will never take this record
    ├── SpoolFull               the spool is at its bound, or its disk is full
    ├── SpoolInUse              another process has the spool
    ├── NotFound                no device or session of that name
    └── InvalidQuery            a query that cannot be understood
"""

from schemas.errors import FleetError


class StoreError(FleetError):
    """Base of all errors of this package. Its text is one sentence for the user."""


class StoreUnavailable(StoreError):  # noqa: N818 - reads as what it says
    """The database does not answer now: away, starting, locked or full. Trying later may help."""


class StoreRefused(StoreUnavailable):
    """The database refuses our configuration: a wrong password, no permission, a file of something else.

    An edge does not start with it; one that runs goes on trying, since it may be put right meanwhile.
    """


class RecordRejected(StoreError):  # noqa: N818
    """The database will never accept a record of the batch. Nothing of the batch was stored."""


class SpoolFull(StoreError):  # noqa: N818
    """Nothing more can be spooled; nothing of the batch was stored."""


class SpoolInUse(StoreError):  # noqa: N818
    """Another process has the spool: the edge runs already, or two edges were given one folder."""


class NotFound(StoreError):  # noqa: N818
    """No device or session of that name."""


class InvalidQuery(StoreError, ValueError):  # noqa: N818
    """A query to the log cannot be understood: an invalid time, reason or grouping."""
