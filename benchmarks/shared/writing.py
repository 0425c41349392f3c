"""Writing process, from inside: SIGTERM ends its text, and its events are lines of JSON on standard output."""

import contextlib
import json
import signal
import sys
import threading
from dataclasses import dataclass, field
from typing import Self

from fleet_device.client.cancellation import Cancellation

__all__ = ["Ending", "tell"]


@dataclass(frozen=True, slots=True)
class Ending:
    """End of a process that writes texts.

    Attributes:
        event: Set when it is to end.
        cancellation: Ends the text that is being written then.
    """

    event: threading.Event = field(default_factory=threading.Event)
    cancellation: Cancellation = field(default_factory=Cancellation)

    def at_sigterm(self) -> Self:
        """Have SIGTERM bring it about; on the main thread. Returns itself."""
        # Not in the handler itself: it would run in the midst of whatever takes the locks that it needs.
        threading.Thread(target=self._cancel, name="cancel", daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: self.event.set())
        return self

    def with_parent(self) -> Self:
        """Have the end of standard input bring it about: whoever started this process has ended. Returns itself."""
        threading.Thread(target=self._outlive_nobody, name="lifeline", daemon=True).start()
        return self

    def _cancel(self) -> None:
        self.event.wait()
        self.cancellation.cancel()

    def _outlive_nobody(self) -> None:
        while sys.stdin.readline():
            pass
        self.event.set()


def tell(event: str, **fields: object) -> None:
    """Write an event, unless nobody reads any more."""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"event": event, **fields}), flush=True)
