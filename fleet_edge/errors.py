"""Exception tree of the edge.

::

    EdgeError
    ├── OpenRefused             an Open that is answered with Refused
    └── DraftFault              a Draft that is answered with Fault

    VerifierError (fleet_edge.verifiers.contract) and StoreError (fleet_edge.session_log) are separate.
"""

from schemas.errors import FleetError
from schemas.reasons import Action, FaultCode, RefusalCode


class EdgeError(FleetError):
    """Base of all errors of this package. Its text is one sentence for the user."""


class OpenRefused(EdgeError):  # noqa: N818 - reads as what it says
    """An Open that is answered with Refused, with the time of a retry (`retry_s`) where that is known."""

    def __init__(self, code: RefusalCode, sentence: str, *, retry_s: float | None = None) -> None:
        super().__init__(sentence)
        self.code = code
        self.retry_s = retry_s


class DraftFault(EdgeError):  # noqa: N818
    """A Draft that is answered with Fault, with the time to wait (`retry_s`) if the action is to wait."""

    def __init__(self, code: FaultCode, action: Action, sentence: str, *, retry_s: float | None = None) -> None:
        super().__init__(sentence)
        self.code = code
        self.action = action
        self.retry_s = retry_s


def tokens_differ(sentence: str) -> DraftFault:
    """Return the fault of a draft that does not fit the edge's tokens, though it may fit others."""
    return DraftFault(FaultCode.TOKENS_DIFFER, Action.RESUME, sentence + " The device resumes with its whole text.")
