"""Fences: quarantined devices, whose messages all edges of a fleet drop.

An edge writes its fences as records, through its writer, and polls `read_fences`; an administrator's are written here,
at once. Both merge alike: lifting ends all fences that began before, even one that is replayed later.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import Connection, or_, select

from fleet_edge.store.event_codes import Severity
from fleet_edge.store.models import FenceLiftRow, FenceRow, select_fields
from fleet_edge.store.records import ADMINISTRATOR, DeviceFenced, EventLogged, FenceLifted
from fleet_edge.store.views import FenceView

_INSTANT: Final = timedelta(microseconds=1)
_NEVER: Final = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Fences:
    """The fences at one moment.

    `active` has, by device, the fence that ends last. `lifted` has the time of the last lift: an edge's own fence that
    is not active may only be unwritten, and is over if it began at this time or before.
    """

    active: Mapping[str, FenceView]
    lifted: Mapping[str, datetime]


def read_fences(connection: Connection, *, now: datetime) -> Fences:
    """Return the fences in force at `now` (aware), by device, and when fences were lifted."""
    lifts = connection.execute(select(FenceLiftRow.device, FenceLiftRow.lifted_at))
    lifted = {row.device: row.lifted_at for row in lifts}
    in_force = select_fields(FenceRow).where(or_(FenceRow.until_at.is_(None), FenceRow.until_at > now))
    active: dict[str, FenceView] = {}
    for row in connection.execute(in_force.order_by(FenceRow.device)).mappings():
        fence = FenceView(**row)
        if fence.device in lifted and lifted[fence.device] >= fence.since_at:
            continue
        rival = active.get(fence.device)
        if rival is None or (rival.until_at or _NEVER) < (fence.until_at or _NEVER):
            active[fence.device] = fence
    return Fences(active, lifted)


def fence_device(
    connection: Connection, device: str, *, until: datetime | None, reason: str, now: datetime
) -> FenceView | None:
    """Fence a device as the administrator, in the transaction of `connection`; `until` None: until it is lifted.

    Returns the fence in force: this one, or one by an edge that ends later; None if `until` has passed.
    """
    # A clock that lags behind that of the stored fence must not make this the earlier one.
    own = select(FenceRow.since_at).where(FenceRow.device == device, FenceRow.by == ADMINISTRATOR)
    lifted = select(FenceLiftRow.lifted_at).where(FenceLiftRow.device == device)
    earlier = [at for at in (connection.scalar(own), connection.scalar(lifted)) if at is not None]
    at = max([now, *(each + _INSTANT for each in earlier)])
    fence = DeviceFenced(
        device=device, by=ADMINISTRATOR, since_at=at, until_at=until, reason=reason, strikes=0, level=0
    )
    _apply(connection, fence, _event(device, code="fenced", sentence=reason, at=now))
    return read_fences(connection, now=now).active.get(device)


def lift_fences(connection: Connection, device: str, *, now: datetime) -> FenceView | None:
    """Lift all fences of a device as the administrator, in the transaction of `connection`.

    Also if none is known: an edge may have fenced the device, and the record not have arrived. Returns the fence that
    was in force, if one was.
    """
    fence = read_fences(connection, now=now).active.get(device)
    known = connection.scalars(select(FenceRow.since_at).where(FenceRow.device == device)).all()
    lift = FenceLifted(device=device, by=ADMINISTRATOR, at=max([now, *known]))
    sentence = "The fence was lifted." if fence else "Fences were lifted; none was in force."
    _apply(connection, lift, _event(device, code="lifted", sentence=sentence, at=now))
    return fence


def _apply(connection: Connection, *records: DeviceFenced | FenceLifted | EventLogged) -> None:
    from fleet_edge.store.merge import merge_records  # noqa: PLC0415 - only to write

    merge_records(connection, records)


def _event(device: str, *, code: str, sentence: str, at: datetime) -> EventLogged:
    return EventLogged.of_administrator(
        kind="fence", code=code, sentence=sentence, at=at, device=device, severity=Severity.INFO
    )
