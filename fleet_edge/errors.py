"""Exception tree of the edge.

::

    EdgeError
    ├── OpenRefused             an Open that is answered with Refused
    └── DraftFault              a Draft that is answered with Fault

    VerifierError (fleet_edge.verifiers.contract) and StoreError (fleet_edge.store) stand beside it.
"""

from schemas.errors import FleetError
from schemas.reasons import Action, FaultCode, RefusalCode


class EdgeError(FleetError):
    """Base of all errors of this package. Its text is one sentence for the user."""


class OpenRefused(EdgeError):  # noqa: N818 - reads as what it says
    """An Open that is answered with Refused; nothing has changed.

    Attributes:
        code: Why.
        retry_s: Seconds after which it may be granted, where that is known.
    """

    def __init__(self, code: RefusalCode, sentence: str, *, retry_s: float | None = None) -> None:
        super().__init__(sentence)
        self.code = code
        self.retry_s = retry_s


class DraftFault(EdgeError):  # noqa: N818
    """A Draft that is answered with Fault; nothing has changed.

    Attributes:
        code: What was wrong.
        action: What the device should do.
        retry_s: Seconds to wait, where that is to wait.
    """

    def __init__(self, code: FaultCode, action: Action, sentence: str, *, retry_s: float | None = None) -> None:
        super().__init__(sentence)
        self.code = code
        self.action = action
        self.retry_s = retry_s


def desync(sentence: str) -> DraftFault:
    """Return the fault of a draft that does not fit the edge's text, though it may fit another."""
    return DraftFault(FaultCode.DESYNC, Action.RESUME, sentence + " The device resumes with its whole text.")
