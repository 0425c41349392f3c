"""Jobs: acts under way, on threads of their own, with what has come of them so far."""

import logging
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from fleet_admin.dashboard.errors import Problem
from schemas.errors import FleetError

_KEPT: Final = 100
_AT_ONCE: Final = 6

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an act at one device.

    Attributes:
        device: Its name.
        state: In a word: `done`, `failed`, or what the device says.
        sentence: The same in words.
        result: What it has answered beside, such as the end of its log.
    """

    device: str
    state: str
    sentence: str
    result: str = ""


@dataclass(slots=True)
class Job:
    """An act under way, or over.

    Attributes:
        id: In its page's address.
        words: What is done.
        who: Who does it.
        began: When.
        devices: How many it meets.
        outcomes: What has come of it so far; only grows.
        problem: Why it could not be done, if it could not.
    """

    id: str
    words: str
    who: str
    began: datetime
    devices: int
    outcomes: list[Outcome] = field(default_factory=list)
    problem: str = ""
    _over: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def over(self) -> bool:
        return self._over.is_set()

    @property
    def counts(self) -> Counter[str]:
        """How many devices have come to which state."""
        return Counter(each.state for each in list(self.outcomes))

    def run(self, steps: Callable[[], Iterator[Outcome]]) -> None:
        """Do it; called on a thread."""
        try:
            for outcome in steps():
                self.outcomes.append(outcome)
        except FleetError as error:
            self.problem = str(error)
        except Exception:  # noqa: BLE001 - whatever it is, the act is over
            _log.exception("An act failed: %s.", self.words)
            self.problem = "It failed; the dashboard's log says why."
        finally:
            self._over.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is over; return whether it is."""
        return self._over.wait(timeout_s)


class Jobs:
    """The jobs of a dashboard, the latest kept in memory; what was done is in the audit log."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()

    def begin(
        self, words: str, *, who: str, now: datetime, devices: int, steps: Callable[[], Iterator[Outcome]]
    ) -> Job:
        """Begin an act.

        Args:
            words: What is done.
            who: Who does it.
            now: When.
            devices: How many it meets.
            steps: Does it, and tells what comes of it, device by device.

        Raises:
            Problem: Too many are under way.
        """
        job = Job(secrets.token_urlsafe(9), words, who, now, devices)
        with self._lock:
            if sum(not each.over for each in self._jobs.values()) >= _AT_ONCE:
                raise Problem(503, f"{_AT_ONCE} acts are under way; begin this one when one is over.", retry_after_s=10)
            self._jobs[job.id] = job
            for old in [each for each in self._jobs.values() if each.over][: max(0, len(self._jobs) - _KEPT)]:
                del self._jobs[old.id]
        threading.Thread(target=job.run, args=(steps,), name="act", daemon=True).start()
        return job

    def find(self, name: str) -> Job:
        """Return a job.

        Raises:
            Problem: There is none; the audit log has what is no longer kept here.
        """
        with self._lock:
            found = self._jobs.get(name)
        if found is None:
            raise Problem(404, "This act is no longer kept here; the audit log says what came of it.")
        return found
