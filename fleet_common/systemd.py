"""systemd notifications: a service tells that it is ready, that it lives, that it is stopping.

The protocol is one datagram to the socket that systemd names in the environment (sd_notify(3)). Started from a shell
there is no such socket, and nothing is said.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, Self

# As sd_watchdog_enabled(3) advises: twice in the time after which systemd kills.
_TIMES: Final = 2
_MICRO: Final = 1_000_000


class Systemd:
    """The unit that this process is.

    Args:
        address: Socket to speak to: a path, or `@` and a name in the abstract namespace. None says nothing.
        watchdog_s: Seconds of silence after which systemd kills the process; None if it does not.
        clock: Monotonic seconds.
    """

    def __init__(
        self, address: str | None, *, watchdog_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._address = "\0" + address[1:] if address is not None and address.startswith("@") else address
        self._every_s = None if address is None or watchdog_s is None else watchdog_s / _TIMES
        self._clock = clock
        self._due = clock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read where systemd listens, if it started this process."""
        micros = environment.get("WATCHDOG_USEC", "")
        # A child that inherits the environment is not the one that is watched.
        watched = micros.isdecimal() and environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        return cls(environment.get("NOTIFY_SOCKET"), watchdog_s=int(micros) / _MICRO if watched else None)

    def ready(self, status: str) -> None:
        """Say that the service serves, and in one line what."""
        self._say(f"READY=1\nSTATUS={_one_line(status)}")

    def alive(self) -> None:
        """Say that the main loop turns; as often as you like, since it is passed on only when due."""
        if self._every_s is not None and self._clock() >= self._due:
            self._due = self._clock() + self._every_s
            self._say("WATCHDOG=1")

    def watch(self, probe: Callable[[], object]) -> None:
        """Say on a thread that the service lives, each time after `probe` has returned.

        Args:
            probe: Touches what could hang. If it hangs itself, or raises, systemd hears nothing more.
        """
        if self._every_s is not None:
            self._thread = threading.Thread(
                target=self._watch, args=(probe, self._every_s), name="watchdog", daemon=True
            )
            self._thread.start()

    def stopping(self) -> None:
        """Say that the service is on its way out; the watchdog's thread goes on until `close`."""
        self._say("STOPPING=1")

    def close(self) -> None:
        """End the thread that `watch` has started."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=self._every_s)

    def _watch(self, probe: Callable[[], object], every_s: float) -> None:
        while not self._ended.is_set():
            probe()
            self._say("WATCHDOG=1")
            self._ended.wait(every_s)

    def _say(self, message: str) -> None:
        if self._address is None:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(0)
            try:
                sender.sendto(message.encode(), self._address)
            except OSError:
                # The unit's manager is away or busy. Nothing can be done about it here, and the service goes on.
                return


def _one_line(text: str) -> str:
    return " ".join(text.split())
