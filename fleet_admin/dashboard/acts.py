"""Operator actions on devices."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.services import ActionOutcome, Services
from fleet_admin.steering import Actor, Selection
from fleet_admin.steering.access import request_access
from fleet_admin.steering.planning import check_change, read_assignments
from fleet_common.identity.certificates import AccessAction
from fleet_common.validation import read_duration
from schemas.errors import FleetError

_log = logging.getLogger(__name__)


MAX_DEVICES: Final = 2_000
"""Maximum per action; for more, use several actions or `fleet admin`."""

Run = Callable[[Services, Sequence[str], str, Actor], Iterator[ActionOutcome]]
"""Applies an action with an argument to devices, for an actor."""


@dataclass(frozen=True, slots=True)
class Act:
    """An operator action on devices.

    Attributes:
        run: Applies it to devices, and yields their outcomes.
        example: Of the value that it takes; empty: it takes none.
        dangerous: Whether it takes something away.
        live: Whether the devices have to be online.
        check: Raises a `FleetError` for an invalid argument, before anything is done.
    """

    key: str
    words: str
    run: Run
    example: str = ""
    required: bool = False
    dangerous: bool = False
    live: bool = False
    check: Callable[[str], object] = lambda _argument: None


def _check_set(argument: str) -> None:
    check_change(read_assignments(argument.split()), ())


def _check_unset(argument: str) -> None:
    check_change({}, argument.split())


def _check_duration(argument: str) -> None:
    try:
        if argument:
            read_duration(argument)
    except (ValueError, OverflowError) as error:
        raise Problem(400, str(error)) from None


def _command(
    name: str, services: Services, devices: Sequence[str], _argument: str, actor: Actor
) -> Iterator[ActionOutcome]:
    chosen = Selection(devices=tuple(devices))
    for each in services.steering.reach().command(name, chosen, actor=actor):
        yield ActionOutcome(each.device, "done" if each.ok else each.outcome, each.sentence, each.result or "")


def _set(
    services: Services, devices: Sequence[str], argument: str, actor: Actor, *, undo: bool = False
) -> Iterator[ActionOutcome]:
    words, chosen = argument.split(), Selection(devices=tuple(devices))
    changes, unset = ({}, words) if undo else (read_assignments(words), ())
    for each in services.steering.reach().set(changes, chosen, actor=actor, unset=unset):
        yield ActionOutcome(each.device, each.state.value, each.sentence)


def _label(
    change: str, services: Services, devices: Sequence[str], argument: str, actor: Actor
) -> Iterator[ActionOutcome]:
    found = services.steering.log.label(devices, **{change: argument.split()}, actor=actor)
    return (ActionOutcome(device, "done", f"Labels: {' '.join(labels) or 'none'}.") for device, labels in found.items())


def _each(one: Callable[[Services, str, str, Actor], str]) -> Run:
    """Return an action applied to one device after another; an error at one does not stop the others."""

    def run(services: Services, devices: Sequence[str], argument: str, actor: Actor) -> Iterator[ActionOutcome]:
        for device in devices:
            try:
                yield ActionOutcome(device, "done", one(services, device, argument, actor))
            except FleetError as error:
                yield ActionOutcome(device, "failed", str(error))

    return run


def _retire(services: Services, device: str, _argument: str, actor: Actor, *, undo: bool = False) -> str:
    services.steering.log.retire(device, undo=undo, actor=actor)
    return f"The device is {'in' if undo else 'out of'} service."


def _quarantine(services: Services, device: str, argument: str, actor: Actor) -> str:
    held = services.log.quarantine(
        device, duration=argument or None, reason=f"By {actor.who}.", who=actor.who, source=actor.source
    )
    until = "until lifted" if held.until_at is None else f"until {held.until_at:%Y-%m-%d %H:%M} UTC"
    return f"The device is quarantined {until}."


def _unquarantine(services: Services, device: str, _argument: str, actor: Actor) -> str:
    held = services.log.unquarantine(device, who=actor.who, source=actor.source)
    if held is None:
        return "The device was not quarantined."
    return f"The quarantine is lifted; {held.by} had set it: {held.reason}"


def _access(
    action: AccessAction, services: Services, devices: Sequence[str], _argument: str, actor: Actor
) -> Iterator[ActionOutcome]:
    for each in request_access(services.steering.log, action, devices, actor=actor):
        yield ActionOutcome(each.device, "done" if each.ok else each.outcome, each.sentence)


ACTS: Final = (
    Act("set", "Change settings", _set, "draft_length=4", required=True, live=True, check=_check_set),
    Act(
        "unset",
        "Reset settings",
        partial(_set, undo=True),
        "draft_length",
        required=True,
        live=True,
        check=_check_unset,
    ),
    Act("drain", "Drain", partial(_command, "drain"), live=True),
    Act("resume", "Resume", partial(_command, "resume"), live=True),
    Act("reload", "Reload the model", partial(_command, "reload"), live=True),
    Act("self-test", "Self-test", partial(_command, "self-test"), live=True),
    Act("log-tail", "Show log tail", partial(_command, "log-tail"), live=True),
    Act("label", "Add labels", partial(_label, "add"), "hall_a", required=True),
    Act("unlabel", "Remove labels", partial(_label, "remove"), "hall_a", required=True),
    Act("quarantine", "Quarantine", _each(_quarantine), "2h", dangerous=True, check=_check_duration),
    Act("unquarantine", "End quarantine", _each(_unquarantine)),
    Act("disconnect", "Disconnect now", partial(_access, AccessAction.DISCONNECT), dangerous=True),
    Act("suspend", "Suspend at the broker", partial(_access, AccessAction.SUSPEND), dangerous=True),
    Act("unsuspend", "End suspension", partial(_access, AccessAction.UNSUSPEND)),
    Act("revoke", "Revoke the certificate", partial(_access, AccessAction.REVOKE), dangerous=True),
    Act("retire", "Retire", _each(_retire), dangerous=True),
    Act("restore", "Restore", _each(partial(_retire, undo=True))),
)


def act_of(key: str) -> Act:
    """Return an action by its key; raises `Problem` if there is none."""
    found = next((each for each in ACTS if each.key == key), None)
    if found is None:
        raise Problem(400, f"There is no action {key[:40]!r}.")
    return found
