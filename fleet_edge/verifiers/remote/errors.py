"""Exception tree of the remote verifier's parts.

::

    VerifierError (fleet_edge.verifiers.contract)
    ├── BadSetting              a setting of the remote verifier cannot work
    ├── EndpointFailed          one inference server did not do its part; another may
    │   ├── BadAnswer           what it sends is no answer to the question
    │   └── EndpointBusy        it has too much to do just now, and is well
    └── RequestRefused          the server finds fault with this one request; another server would too
"""

from fleet_edge.verifiers.contract import VerifierError


class BadSetting(VerifierError):  # noqa: N818 - reads as what it says
    """A setting of the remote verifier cannot work.

    Attributes:
        setting: Its name.
    """

    def __init__(self, sentence: str, *, setting: str) -> None:
        super().__init__(sentence)
        self.setting = setting


class EndpointFailed(VerifierError):  # noqa: N818 - reads as what it says
    """An inference server did not do its part; another may.

    Attributes:
        suspect: Whether the request may be what it fails on: it was received, and not answered as it should be.
    """

    def __init__(self, sentence: str, *, suspect: bool = False) -> None:
        super().__init__(sentence)
        self.suspect = suspect


class BadAnswer(EndpointFailed):
    """What a server sends is no answer to the question; the text says in a few words why."""

    def __init__(self, what: str) -> None:
        super().__init__(what, suspect=True)


class EndpointBusy(EndpointFailed):
    """An inference server has too much to do just now.

    Attributes:
        retry_s: Seconds after which it asks to be tried again.
    """

    def __init__(self, sentence: str, *, retry_s: float) -> None:
        super().__init__(sentence)
        self.retry_s = retry_s


class RequestRefused(VerifierError):  # noqa: N818
    """An inference server finds fault with one request, as any other of its kind would."""
