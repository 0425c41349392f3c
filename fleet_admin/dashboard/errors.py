"""Exceptions of the dashboard.

::

    DashboardError              anything that the operator has to put right
    ├── AccountError            an account, a password or a key that cannot be as it is asked for
    └── Problem                 a request that is not served, with its HTTP status
"""

from schemas.errors import FleetError


class DashboardError(FleetError):
    """Base of all errors of the dashboard."""


class AccountError(DashboardError):
    """An invalid account, password or key."""


class Problem(DashboardError):  # noqa: N818 - reads as what it says
    """A request that is refused, with its HTTP status; `retry_after_s` says when to try again, if known."""

    def __init__(self, status: int, sentence: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.retry_after_s = retry_after_s
