"""Services: what pages are made of, opened once for the dashboard's process."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from fleet_admin.alerts.alerts import Alerts
from fleet_admin.dashboard.accounts.accounts import Accounts
from fleet_admin.dashboard.accounts.attempts import Attempts
from fleet_admin.dashboard.accounts.database import AccountDatabase
from fleet_admin.dashboard.accounts.keys import ApiKeys
from fleet_admin.dashboard.accounts.logins import Logins
from fleet_admin.dashboard.accounts.secrets import Passwords
from fleet_admin.dashboard.jobs import Jobs
from fleet_admin.dashboard.said import Said
from fleet_admin.dashboard.settings import DashboardSettings
from fleet_admin.dashboard.steering import DashboardSteering
from fleet_edge.session_log import SessionLog


@dataclass(frozen=True, slots=True)
class Services:
    """What pages are made of. May be used by several threads.

    Attributes:
        settings: Of the dashboard.
        log: The session log.
        alerts: What is wrong, in the same database.
        accounts: Who may look.
        logins: Browsers that are logged in.
        keys: Programs that may ask.
        attempts: To log in.
        said: Sentences for the page after a form.
        steering: Labels, the audit log, and, where the settings say so, devices.
        jobs: Acts under way.
        now: The wall clock (aware).
        clock: Monotonic seconds.
    """

    settings: DashboardSettings
    log: SessionLog
    accounts: Accounts
    logins: Logins
    keys: ApiKeys
    attempts: Attempts
    said: Said
    steering: DashboardSteering
    jobs: Jobs
    alerts: Alerts
    now: Callable[[], datetime]
    clock: Callable[[], float] = field(repr=False)


def open_services(
    settings: DashboardSettings,
    *,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    clock: Callable[[], float] = time.monotonic,
    passwords: Passwords | None = None,
) -> Services:
    """Open the database and what is in it.

    Raises:
        StoreError: It cannot be opened.
    """
    database = AccountDatabase(settings.db)
    return Services(
        settings=settings,
        log=SessionLog(settings.db, now=now),
        accounts=Accounts(database, passwords=passwords, now=now),
        logins=Logins(
            database, idle=timedelta(hours=settings.idle_h), longest=timedelta(hours=settings.login_h), now=now
        ),
        keys=ApiKeys(database, now=now),
        attempts=Attempts(clock),
        said=Said(),
        steering=DashboardSteering(settings),
        jobs=Jobs(),
        alerts=Alerts(settings.db, now=now),
        now=now,
        clock=clock,
    )
