"""How a start goes: from the first attempt to a connection, or to the reason why there is none."""

import threading

from fleet_link.errors import ConnectFailed

__all__ = ["Startup"]


class Startup:
    """Told by the link's thread, waited for by whoever started it. One for every start."""

    def __init__(self) -> None:
        self._settled = threading.Event()
        self._connected = False
        self._failure: ConnectFailed | None = None

    @property
    def pending(self) -> bool:
        """Whether no attempt has succeeded yet."""
        return not self._connected

    def connected(self) -> None:
        """An attempt has succeeded."""
        self._connected = True
        self._settled.set()

    def failed(self, error: ConnectFailed) -> None:
        """An attempt has failed; the last word if trying again is pointless."""
        self._failure = error
        if error.final:
            self._settled.set()

    def ended(self) -> None:
        """There will be no further attempt."""
        self._settled.set()

    def wait(self, timeout_s: float, otherwise: ConnectFailed) -> None:
        """Return when connected.

        Args:
            timeout_s: Longest wait.
            otherwise: What to raise if not even one attempt has come to an end.

        Raises:
            ConnectFailed: What the last attempt died of.
        """
        self._settled.wait(timeout_s)
        if not self._connected:
            raise self._failure if self._failure is not None else otherwise
