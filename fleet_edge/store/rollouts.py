"""Rollouts: what was rolled out to which machine, when, by which user, with which outcome; the playbooks write them.

A playbook writes a row for each machine when it begins, and completes it when the machine is done. Rows are named by
rollout and machine, so that writing one again changes nothing.
"""

import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Connection, Select, and_, delete, func, insert, select, update

from fleet_edge.store.event_codes import EventKind
from fleet_edge.store.models import DeviceRow, EdgeRow, RolloutRow
from fleet_edge.store.records import ADMINISTRATOR, EventLogged
from fleet_edge.store.views import MachineRelease, MachineRollout, Rollout

_EVENTS: Final = uuid.UUID("6f3f5d1e-0a6b-4b44-9a55-0d3a4c1f7b20")
"""Namespace of the events' ids: the same outcome on a machine is one event, however often it is written."""

_KEPT: Final = 500
"""Number of rollouts kept; older ones are deleted when a new one is written."""


class RolloutAction(StrEnum):
    SITE = "site"
    ROLLOUT = "rollout"
    ROLLBACK = "rollback"
    DECOMMISSION = "decommission"


class RolloutOutcome(StrEnum):
    WAITING = "waiting"  # its turn has not come, or it is not done yet
    PROVEN = "proven"  # the release runs, and has passed its proof
    UNCHANGED = "unchanged"  # it ran already
    WENT_BACK = "went-back"  # the release failed its proof; the one before runs, and is proven
    FAILED = "failed"  # nobody has proven what runs now
    UNTOUCHED = "untouched"  # another machine failed first
    REMOVED = "removed"  # the fleet was taken off it


ENDED: Final = frozenset(RolloutOutcome) - {RolloutOutcome.WAITING}


def record_rollouts(connection: Connection, machines: Sequence[MachineRollout], *, stopped: bool = False) -> None:
    """Write what became of machines, in the transaction of `connection`.

    The latest row of a machine counts, except one that is done and would wait again. `stopped`: their rollouts are
    over, so machines that still wait were not touched.
    """
    for machine in machines:
        _write(connection, machine)
    events = [_event(machine) for machine in machines if machine.outcome != RolloutOutcome.WAITING]
    from fleet_edge.store.merge import merge_records  # noqa: PLC0415 - only to write

    merge_records(connection, events)
    if stopped:
        for rollout, at in {machine.rollout: machine.ended_at or machine.started_at for machine in machines}.items():
            connection.execute(
                update(RolloutRow)
                .where(RolloutRow.rollout == rollout, RolloutRow.outcome == RolloutOutcome.WAITING.value)
                .values(outcome=RolloutOutcome.UNTOUCHED.value, running=RolloutRow.found, ended_at=at)
            )
    _forget_old(connection)


def rollouts(connection: Connection, *, since: datetime | None, limit: int) -> list[Rollout]:
    begun = func.min(RolloutRow.started_at)
    latest = select(RolloutRow.rollout).group_by(RolloutRow.rollout).order_by(begun.desc(), RolloutRow.rollout)
    if since is not None:
        latest = latest.having(begun >= since)
    ids = list(connection.scalars(latest.limit(limit)))
    grouped: dict[str, list[MachineRollout]] = {rollout: [] for rollout in ids}
    for machine in _machines(connection, select(RolloutRow).where(RolloutRow.rollout.in_(ids))):
        grouped[machine.rollout].append(machine)
    return [_whole(rollout, grouped[rollout]) for rollout in ids]


def machines_of(connection: Connection, rollout: str) -> list[MachineRollout]:
    return _machines(connection, select(RolloutRow).where(RolloutRow.rollout == rollout))


def releases(connection: Connection) -> list[MachineRelease]:
    """Return the release that each machine should run next to the one that it runs, by kind and name."""
    newest = (
        select(RolloutRow.kind, RolloutRow.name, func.max(RolloutRow.started_at).label("at"))
        .group_by(RolloutRow.kind, RolloutRow.name)
        .subquery()
    )
    same = and_(
        RolloutRow.kind == newest.c.kind, RolloutRow.name == newest.c.name, RolloutRow.started_at == newest.c.at
    )
    found = _machines(connection, select(RolloutRow).join(newest, same))
    devices = connection.execute(select(DeviceRow.device, DeviceRow.software))
    edges = connection.execute(select(EdgeRow.edge, EdgeRow.software))
    said = {("device", row.device): row.software for row in devices}
    said |= {("edge", row.edge): row.software for row in edges}
    by_name = {(machine.kind, machine.name): machine for machine in found}
    return [
        MachineRelease(
            **{name: getattr(each, name) for name in ("kind", "name", "host", "wanted", "rollout", "outcome")},
            running=each.running if each.outcome in ENDED else each.found,
            software=said.get(key),
            since=each.ended_at or each.started_at,
        )
        for key, each in sorted(by_name.items())
    ]


def _machines(connection: Connection, query: Select[Any]) -> list[MachineRollout]:
    rows = connection.execute(query.order_by(RolloutRow.kind, RolloutRow.name))
    return [MachineRollout(**row) for row in rows.mappings()]


def _whole(rollout: str, machines: Sequence[MachineRollout]) -> Rollout:
    ends = [machine.ended_at for machine in machines]
    wanted = {machine.wanted for machine in machines}
    return Rollout(
        rollout=rollout,
        action=machines[0].action,
        who=machines[0].who,
        started_at=min(machine.started_at for machine in machines),
        ended_at=None if None in ends else max(end for end in ends if end is not None),
        wanted=wanted.pop() if len(wanted) == 1 else None,
        machines=len(machines),
        outcomes=dict(Counter(machine.outcome for machine in machines)),
    )


def _write(connection: Connection, machine: MachineRollout) -> None:
    here = and_(RolloutRow.rollout == machine.rollout, RolloutRow.host == machine.host)
    known = connection.execute(select(RolloutRow.outcome, RolloutRow.found).where(here)).one_or_none()
    row: dict[str, Any] = {
        field.name: str(value) if isinstance(value := getattr(machine, field.name), StrEnum) else value
        for field in fields(machine)
    }
    if known is None:
        connection.execute(insert(RolloutRow).values(**row))
    elif machine.outcome != RolloutOutcome.WAITING:
        del row["started_at"]
        row["found"] = row["found"] or known.found
        connection.execute(update(RolloutRow).where(here).values(**row))


def _event(machine: MachineRollout) -> EventLogged:
    named = f"{machine.rollout}/{machine.host}/{machine.outcome}"
    return EventLogged(
        id=uuid.uuid5(_EVENTS, named).hex,
        edge=machine.name if machine.kind == "edge" else ADMINISTRATOR,
        device=machine.name if machine.kind == "device" else None,
        kind=EventKind.ROLLOUT.value,
        code=str(machine.outcome),
        sentence=_sentence(machine),
        at=machine.ended_at or machine.started_at,
        who=machine.who,
    )


def _sentence(machine: MachineRollout) -> str:
    said = {
        RolloutOutcome.PROVEN: f"{machine.running} was rolled out and passed its tests.",
        RolloutOutcome.UNCHANGED: f"{machine.running} runs already.",
        RolloutOutcome.WENT_BACK: f"{machine.wanted} failed its tests; {machine.running} runs again.",
        RolloutOutcome.FAILED: f"{machine.wanted} failed, and the running release is untested.",
        RolloutOutcome.REMOVED: "The software was removed from this machine.",
    }.get(RolloutOutcome(machine.outcome), f"The {machine.action} stopped before this machine.")
    return f"{said} {machine.sentence}".strip()


def _forget_old(connection: Connection) -> None:
    begun = func.min(RolloutRow.started_at)
    old = select(RolloutRow.rollout).group_by(RolloutRow.rollout).order_by(begun.desc(), RolloutRow.rollout)
    gone = list(connection.scalars(old.offset(_KEPT).limit(_KEPT)))
    if gone:
        connection.execute(delete(RolloutRow).where(RolloutRow.rollout.in_(gone)))
