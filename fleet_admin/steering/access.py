"""Access of devices at the broker: requests to change it, those who carry them out, and the facts about a device.

Only the authority can refuse a device at the broker or end its session, and its key belongs into no dashboard. So
dashboard and `fleet admin` store a request as a command in the session log. `fleet broker enforce` on the authority's
machine carries it out, and records what the broker's answers prove.
"""

import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from fleet_admin.steering.log import ASKED, SteeringLog
from fleet_admin.steering.planning import Actor, CommandResult
from fleet_common.identity.authority import Authority
from fleet_common.identity.certificates import AccessAction, IdentityRole
from fleet_common.identity.enforcement import CUT_OFF_S, INSTALLER_S, BrokerAccess, enforce_change
from fleet_common.identity.files import CutOffFailed
from fleet_edge.session_log import DONE, EventKind, Filter, QuarantineView, StoreUnavailable
from schemas.control import CommandRequest
from schemas.errors import FleetError
from schemas.names import check_name

if TYPE_CHECKING:
    from fleet_admin.steering.clients import BrokerClient

_log = logging.getLogger(__name__)

_LIMIT_S: Final = 60.0
_EACH_S: Final = 1.0  # more for each device of a request, since they take turns
_POLL_S: Final = 0.5
_NEEDED: Final = timedelta(seconds=INSTALLER_S + CUT_OFF_S + 2)
"""Time until the deadline without which a request is not begun: it ends before the requester gives up."""

_OK: Final = "ok"
_FAILED: Final = "failed"
_SILENT: Final = "silent"


def request_access(
    log: SteeringLog, action: AccessAction, devices: Sequence[str], *, actor: Actor, limit_s: float = _LIMIT_S
) -> Iterator[CommandResult]:
    """Store a request for each device, and yield what came of it.

    Nothing is requested if it raises `InvalidName`, or `StoreUnavailable` because the request cannot be recorded.
    """
    limit_s += _EACH_S * len(devices)
    deadline = datetime.now(UTC) + timedelta(seconds=limit_s)
    requests = {
        check_name(device): CommandRequest(
            id=secrets.token_hex(8), command=action.value, deadline=deadline, who=actor.who[:100]
        )
        for device in devices
    }
    batch = secrets.token_hex(8)
    entries = [actor.entry(action.value, device, outcome=ASKED) for device in requests]
    log.keep_commands(requests, entries, batch=batch)
    return _results(log, batch, len(requests), limit_s)


def _results(log: SteeringLog, batch: str, number: int, limit_s: float) -> Iterator[CommandResult]:
    began, reported = time.monotonic(), set[str]()
    while True:
        late = time.monotonic() - began > limit_s
        for each in log.commands(where=[Filter("batch", "=", batch)], limit=number):
            outcome, sentence = each.outcome, each.sentence or ""
            if outcome is None and late:
                outcome = _SILENT
                sentence = (
                    f"It was not carried out within {limit_s:.0f} s, and will not be: see that `fleet broker enforce` "
                    "runs on the authority's machine with this database."
                )
                log.end_access(each, outcome, sentence)
            if outcome is not None and each.id not in reported:
                reported.add(each.id)
                yield CommandResult(
                    device=each.device, id=each.id, outcome=outcome, sentence=sentence, seconds=time.monotonic() - began
                )
        if late or len(reported) == number:
            return
        time.sleep(_POLL_S)


def carry_out_forever(log: SteeringLog, authority: Authority, access: BrokerAccess) -> None:
    away = False
    while True:
        try:
            carry_out(log, authority, access)
            away = False
        except StoreUnavailable as error:
            if not away:
                _log.warning("Requests wait for the session log: %s", error)
            away = True
        time.sleep(_POLL_S)


def carry_out(log: SteeringLog, authority: Authority, access: BrokerAccess) -> None:
    """Carry out the requests that wait in the session log, the earliest first."""
    waiting = [Filter("outcome", "=", None), *(Filter("command", "=", each.value) for each in AccessAction)]
    for each in reversed(log.commands(since=datetime.now(UTC) - timedelta(hours=1), where=waiting, limit=10_000)):
        if each.deadline_at - datetime.now(UTC) < _NEEDED:
            continue
        action, actor = AccessAction(each.command), Actor(each.who)
        try:
            sentence = _change(replace(authority, actor=actor.who), access, action, each.device)
            outcome = _OK
        except FleetError as error:
            outcome, sentence = _FAILED, str(error)
        log.end_access(each, outcome, sentence)
        note_access(log, action, each.device, sentence, actor=actor, failed=outcome == _FAILED)


def _change(authority: Authority, access: BrokerAccess, action: AccessAction, device: str) -> str:
    # Whoever can write to the session log must not be able to shut out edges and administrators.
    roles = {entry.role for entry in authority.entries() if entry.name == device}
    if roles - {IdentityRole.DEVICE}:
        raise CutOffFailed(f"{device} is no device: use `fleet broker {action} {device}` on the authority's machine.")
    change = authority.change_access(action, [device])
    try:
        done = enforce_change(change, access)
    except CutOffFailed as error:
        if change.revocation_list is None:
            raise
        raise CutOffFailed(f"The authority has recorded it, but it is not in force yet: {error}") from error
    if done is None:
        raise CutOffFailed("The broker was not notified, because --host is not known.")
    return done.sentence(action)


def note_access(
    log: SteeringLog, action: AccessAction, device: str, sentence: str, *, actor: Actor, failed: bool = False
) -> None:
    log.note(EventKind.IDENTITY, [(device, "not-changed" if failed else action.done, sentence)], actor=actor)


def record_access(
    log: SteeringLog, action: AccessAction, device: str, outcome: str, sentence: str, *, actor: Actor
) -> None:
    """Record an action that was carried out without a request; without proof the outcome is not `done`."""
    log.record([actor.entry(action.value, device, outcome=f"{outcome}: {sentence}")])
    note_access(log, action, device, sentence, actor=actor, failed=outcome == _FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessFact:
    """One fact about a device's access, and how it is known."""

    fact: str
    state: str
    since: datetime | None = None
    sentence: str = ""


def access_facts(
    log: SteeringLog,
    device: str,
    *,
    client: "BrokerClient | None",
    absence: str,
    quarantine: QuarantineView | None,
    certificate_until: datetime | None,
    now: datetime,
) -> list[AccessFact]:
    """Return the facts about a device: connected, refused, certificate.

    `client` is the device as the broker sees it; `absence` says why that is not known.
    """
    if client is not None:
        connected = AccessFact(fact="connected", state=client.state, since=client.since, sentence=client.sentence)
    else:
        unseen = absence or "The broker has not named it since this program connected, and retains no state of it."
        connected = AccessFact(fact="connected", state="unknown", sentence=unseen)
    lasting = [each for each in AccessAction if each is not AccessAction.DISCONNECT]
    wanted = [Filter("subject", "=", device), *(Filter("action", "=", each.value) for each in lasting)]
    entries = log.audit(where=wanted, limit=20)
    last = next((each for each in entries if each.outcome.partition(":")[0] in {_OK, DONE}), None)
    facts = [connected]
    refused = last is not None and last.action != AccessAction.UNSUSPEND
    if last is None:
        facts.append(AccessFact(fact="at the broker", state="accepted", sentence="No refusal is recorded."))
    else:
        message = f"{last.outcome.partition(': ')[2]} By {last.who}."
        state = "refused" if refused else "accepted"
        facts.append(AccessFact(fact="at the broker", state=state, since=last.at, sentence=message))
    if entries and entries[0] is not last:
        outcome, _, message = entries[0].outcome.partition(": ")
        fact = f"latest request: {entries[0].action}"
        facts.append(AccessFact(fact=fact, state=outcome, since=entries[0].at, sentence=message))
    if quarantine is not None:
        ends = "until lifted" if quarantine.until_at is None else f"until {quarantine.until_at:%Y-%m-%d %H:%M} UTC"
        message = f"By {quarantine.by}, {ends}: {quarantine.reason}"
        facts.append(AccessFact(fact="at the edges", state="quarantined", since=quarantine.since_at, sentence=message))
    else:
        facts.append(AccessFact(fact="at the edges", state="accepted"))
    until = certificate_until
    state = "unknown" if until is None else "valid" if until > now else "ended"
    if last is not None and refused:
        state = AccessAction(last.action).done
    message = "The device has reported no end." if until is None else f"Until {until:%Y-%m-%d}, as the device reports."
    return [*facts, AccessFact(fact="certificate", state=state, sentence=message)]
