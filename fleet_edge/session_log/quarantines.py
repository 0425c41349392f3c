"""Quarantines: quarantined devices, whose messages all edges of a fleet drop.

An edge writes its quarantines as records, through its writer, and polls `read_quarantines`; an administrator's are
written here, at once. Both merge alike: lifting ends all quarantines that began before, even one that is
replayed later.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import Connection, and_, or_, select

from fleet_edge.session_log.engine import CLOCKS_DIFFER
from fleet_edge.session_log.event_codes import Severity
from fleet_edge.session_log.records import ADMINISTRATOR, Record, event_record, lift_record, quarantine_record
from fleet_edge.session_log.tables import QUARANTINE_LIFTS, QUARANTINES
from fleet_edge.session_log.views import QuarantineView

_INSTANT: Final = timedelta(microseconds=1)
_NEVER: Final = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Quarantines:
    """The quarantines at one moment.

    `active` has, by device, the quarantine that ends last. `lifted` has the time of the last lift: an edge's own
    quarantine that is not active may only be unwritten, and is over if it began at this time or before.
    """

    at: datetime
    active: Mapping[str, QuarantineView]
    lifted: Mapping[str, datetime]


def read_quarantines(connection: Connection, *, now: datetime) -> Quarantines:
    """Return the quarantines in force at `now` (aware), by device, and when quarantines were lifted.

    An edge whose clock is far ahead would quarantine devices at other edges until its wrong time.
    """
    lifts = connection.execute(select(QUARANTINE_LIFTS.c.device, QUARANTINE_LIFTS.c.lifted_at))
    lifted = {row.device: row.lifted_at for row in lifts}
    credible = or_(QUARANTINES.c.by == ADMINISTRATOR, QUARANTINES.c.since_at <= now + CLOCKS_DIFFER)
    in_force = select(QUARANTINES).where(
        or_(QUARANTINES.c.until_at.is_(None), and_(QUARANTINES.c.until_at > now, credible))
    )
    active: dict[str, QuarantineView] = {}
    for row in connection.execute(in_force.order_by(QUARANTINES.c.device)).mappings():
        quarantine = QuarantineView(**row)
        if quarantine.device in lifted and lifted[quarantine.device] >= quarantine.since_at:
            continue
        rival = active.get(quarantine.device)
        if rival is None or (rival.until_at or _NEVER) < (quarantine.until_at or _NEVER):
            active[quarantine.device] = quarantine
    return Quarantines(now, active, lifted)


def quarantine_device(
    connection: Connection, device: str, *, until: datetime | None, reason: str, now: datetime
) -> QuarantineView | None:
    """Quarantine a device as the administrator, in the transaction of `connection`; `until` None: until it is lifted.

    Returns the quarantine in force: this one, or one by an edge that ends later; None if `until` has passed.
    """
    # A clock that lags behind that of the stored quarantine must not make this the earlier one.
    own = select(QUARANTINES.c.since_at).where(QUARANTINES.c.device == device, QUARANTINES.c.by == ADMINISTRATOR)
    lifted = select(QUARANTINE_LIFTS.c.lifted_at).where(QUARANTINE_LIFTS.c.device == device)
    earlier = [at for at in (connection.scalar(own), connection.scalar(lifted)) if at is not None]
    at = max([now, *(each + _INSTANT for each in earlier)])
    quarantine = QuarantineView(
        device=device, by=ADMINISTRATOR, since_at=at, until_at=until, reason=reason, strikes=0, level=0
    )
    _apply(connection, quarantine_record(quarantine), _event(device, code="begun", sentence=reason, at=now))
    return read_quarantines(connection, now=now).active.get(device)


def lift_quarantines(connection: Connection, device: str, *, now: datetime) -> QuarantineView | None:
    """Lift all quarantines of a device as the administrator, in the transaction of `connection`.

    Also if none is known: an edge may have quarantined the device, and the record not have arrived. Returns the
    quarantine that was in force, if one was.
    """
    quarantine = read_quarantines(connection, now=now).active.get(device)
    known = connection.scalars(select(QUARANTINES.c.since_at).where(QUARANTINES.c.device == device)).all()
    # A quarantine by a clock that is far ahead must not make the lift one of all that come until then.
    at = max([now, *(each for each in known if each <= now + CLOCKS_DIFFER)])
    sentence = "The quarantine was lifted." if quarantine else "Quarantines were lifted; none was in force."
    _apply(connection, lift_record(device, ADMINISTRATOR, at), _event(device, code="lifted", sentence=sentence, at=now))
    return quarantine


def _apply(connection: Connection, *records: Record) -> None:
    from fleet_edge.session_log.merge import merge_records  # noqa: PLC0415 - only to write

    merge_records(connection, records)


def _event(device: str, *, code: str, sentence: str, at: datetime) -> Record:
    return event_record(at, kind="quarantine", code=code, sentence=sentence, device=device, severity=Severity.INFO)
