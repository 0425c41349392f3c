"""Services that pages use, opened once for the dashboard's process."""

import logging
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from fleet_admin.dashboard.accounts import AccountDatabase, Accounts, Attempts, Logins, Passwords
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.settings import DashboardSettings
from fleet_admin.steering import DeviceSettingsView, Steering, SteeringLog
from fleet_edge.session_log import SessionLog
from schemas.errors import FleetError

_KEPT: Final = 100
_AT_ONCE: Final = 6


@dataclass(frozen=True, slots=True)
class ActionOutcome:
    """Outcome of an action at one device; the state is `done`, `failed`, or the device's."""

    device: str
    state: str
    sentence: str
    result: str = ""


@dataclass(slots=True)
class ActionJob:
    """An action in progress, or finished; `outcomes` only grow, `problem` says why it failed."""

    id: str
    words: str
    who: str
    began: datetime
    devices: int
    outcomes: list[ActionOutcome] = field(default_factory=list)
    problem: str = ""
    _over: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def over(self) -> bool:
        return self._over.is_set()

    @property
    def counts(self) -> Counter[str]:
        return Counter(each.state for each in list(self.outcomes))

    def run(self, steps: Callable[[], Iterator[ActionOutcome]]) -> None:
        try:
            for outcome in steps():
                self.outcomes.append(outcome)
        except FleetError as error:
            self.problem = str(error)
        except Exception:  # noqa: BLE001 - whatever it is, the act is over
            _log.exception("An act failed: %s.", self.words)
            self.problem = "The action failed; the dashboard's log has the reason."
        finally:
            self._over.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is finished; return whether it is."""
        return self._over.wait(timeout_s)


class ActionJobs:
    """The latest jobs of a dashboard, in memory; the audit log has all actions."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, ActionJob] = OrderedDict()
        self._lock = threading.Lock()

    def begin(
        self, words: str, *, who: str, now: datetime, devices: int, steps: Callable[[], Iterator[ActionOutcome]]
    ) -> ActionJob:
        """Start an action, whose `steps` yield outcomes; raises `Problem` if too many are in progress."""
        job = ActionJob(secrets.token_urlsafe(9), words, who, now, devices)
        with self._lock:
            if sum(not each.over for each in self._jobs.values()) >= _AT_ONCE:
                raise Problem(
                    503, f"{_AT_ONCE} actions are running; start this one when one has ended.", retry_after_s=10
                )
            self._jobs[job.id] = job
            for old in [each for each in self._jobs.values() if each.over][: max(0, len(self._jobs) - _KEPT)]:
                del self._jobs[old.id]
        threading.Thread(target=job.run, args=(steps,), name="act", daemon=True).start()
        return job

    def find(self, name: str) -> ActionJob:
        """Return a job; raises `Problem` if it is no longer kept."""
        with self._lock:
            found = self._jobs.get(name)
        if found is None:
            raise Problem(404, "This action is no longer kept here; the audit log has its results.")
        return found


_IDLE: Final = timedelta(hours=8)
_LOGIN: Final = timedelta(days=7)
"""Inactivity after which a browser must log in again, and the time after which it must in any case."""

_AGAIN_S: Final = 15.0

_log = logging.getLogger(__name__)


class DashboardSteering:
    """Connects to the broker in the background, and retries. `log` works without a broker."""

    def __init__(self, settings: DashboardSettings) -> None:
        self.log = SteeringLog(settings.db)
        self._settings = settings
        self._steering: Steering | None = None
        self._why = (
            "The dashboard is not connected to the broker; it connects when it first can."
            if settings.steer
            else "Settings and commands need a broker: start the dashboard with --steer."
        )
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def absence(self) -> str:
        """Return why devices cannot be reached now; empty if they can."""
        steering = self._steering
        if steering is None:
            return self._why
        return "" if steering.connected else "The broker does not answer now."

    def reach(self) -> Steering:
        """Return the connected `Steering`; raises `Problem` if there is none now."""
        if self._steering is None or self.absence:
            raise Problem(503 if self._settings.steer else 409, self.absence)
        return self._steering

    def settings_of(self, device: str) -> DeviceSettingsView | None:
        """Return a device's settings from the broker; None for an unknown device. Raises as `reach`."""
        found = self.reach().wanted_and_reported([device])
        return found[0] if found else None

    def start(self) -> None:
        if self._settings.steer:
            self._thread = threading.Thread(target=self._connect, name="steering-connect", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._steering is not None:
            self._steering.stop()
        self.log.close()

    def _connect(self) -> None:
        while not self._ended.is_set():
            steering = Steering.open(self._settings, self._settings.db)
            try:
                steering.start()
            except FleetError as error:
                if self._why != str(error):
                    _log.warning("Devices cannot be reached: %s", error)
                self._why = str(error)
                self._ended.wait(_AGAIN_S)
                continue
            self._steering = steering
            return


@dataclass(frozen=True, slots=True)
class Services:
    settings: DashboardSettings
    log: SessionLog
    accounts: Accounts
    logins: Logins
    attempts: Attempts
    steering: DashboardSteering
    jobs: ActionJobs
    now: Callable[[], datetime]
    clock: Callable[[], float] = field(repr=False)


def open_services(
    settings: DashboardSettings,
    *,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    clock: Callable[[], float] = time.monotonic,
    passwords: Passwords | None = None,
) -> Services:
    """Open the database and the services; raises `StoreError` if it cannot be opened."""
    database = AccountDatabase(settings.db, now=now)
    logins = Logins(database, idle=_IDLE, longest=_LOGIN)
    return Services(
        settings=settings,
        log=SessionLog(settings.db, now=now),
        accounts=Accounts(database, passwords=passwords),
        logins=logins,
        attempts=Attempts(clock, usual=logins.addresses()),
        steering=DashboardSteering(settings),
        jobs=ActionJobs(),
        now=now,
        clock=clock,
    )
