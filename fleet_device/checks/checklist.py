"""Checklist: runs checks in order and tells each as it ends; after a failure nothing more is tried."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from fleet_device.drafters.contract import DrafterError
from fleet_device.errors import DeviceError
from fleet_link.errors import LinkError

__all__ = ["Check", "Checklist"]


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found.

    Attributes:
        name: What was checked.
        ok: Whether it is as it should be.
        ms: Time taken; 0 if it was not tried.
        sentence: For the operator: what was found, or what to do.
    """

    name: str
    ok: bool
    ms: float
    sentence: str

    def json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "ms": round(self.ms, 1)}


@dataclass(slots=True)
class Checklist:
    """One run of checks.

    Attributes:
        names: What will be checked, in order.
        on_check: Told of every check as it ends.
        clock: Monotonic seconds.
    """

    names: tuple[str, ...]
    on_check: Callable[[Check], None] = lambda _check: None
    clock: Callable[[], float] = time.monotonic
    _done: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether none has failed so far."""
        return all(check.ok for check in self._done)

    def check(self, probe: Callable[[], str], *, regardless: bool = False) -> None:
        """Do the next check, unless one has failed.

        Args:
            probe: Returns what it found, or raises what is wrong.
            regardless: Do it all the same: it needs nothing of those before it.
        """
        if not self.ok and not regardless:
            self._skip()
            return
        started = self.clock()
        try:
            sentence, ok = probe(), True
        except (DeviceError, DrafterError, LinkError) as error:
            sentence, ok = str(error), False
        self._tell(ok=ok, ms=(self.clock() - started) * 1e3, sentence=sentence)

    def finish(self) -> tuple[Check, ...]:
        """Say of the rest that it was not tried, and return all checks."""
        while len(self._done) < len(self.names):
            self._skip()
        return tuple(self._done)

    def _skip(self) -> None:
        failed = next((check.name for check in self._done if not check.ok), None)
        self._tell(ok=False, ms=0.0, sentence=f"Not tried, since {failed} failed.")

    def _tell(self, *, ok: bool, ms: float, sentence: str) -> None:
        check = Check(self.names[len(self._done)], ok, ms, sentence)
        self._done.append(check)
        self.on_check(check)
