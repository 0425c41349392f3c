"""Machines that the fleet's authority knows and the log does not, or the other way round."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from fleet_common.identity.certificates import IdentityRole, probe_name
from fleet_common.identity.index import CertificateState, CertificateStatus, Entry, certificate_statuses
from fleet_edge.session_log import SessionLog


class UnmatchedKind(StrEnum):
    NEVER_SEEN = "never-seen"  # it has a certificate, and no edge has ever seen it
    NOT_ENROLLED = "not-enrolled"  # it was seen, and has no valid certificate of this authority


@dataclass(frozen=True, slots=True)
class Sighted:
    name: str
    role: IdentityRole
    seen_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmatchedMachine:
    """A machine that only the log or only the authority knows. `sentence` says what to do."""

    name: str
    role: IdentityRole
    kind: UnmatchedKind
    sentence: str
    enrolled_at: datetime | None = None
    seen_at: datetime | None = None


_SPEAKING: Final = frozenset({IdentityRole.DEVICE, IdentityRole.EDGE})
_IN_FORCE: Final = frozenset({CertificateState.VALID, CertificateState.DUE})


def sighted_in(log: SessionLog) -> list[Sighted]:
    devices = [Sighted(each.device, IdentityRole.DEVICE, each.seen_at) for each in log.devices(counted=False)]
    return devices + [Sighted(each.edge, IdentityRole.EDGE, each.seen_at) for each in log.edges()]


def find_unmatched(entries: Sequence[Entry], sighted: Iterable[Sighted], *, now: datetime) -> list[UnmatchedMachine]:
    """Find unmatched, those never seen first, each kind by name. `entries` are certificates, oldest first."""
    known = {
        (status.name, status.role): status
        for status in certificate_statuses(entries, now=now)
        if status.role in _SPEAKING
    }
    begun = {entry.serial: entry.not_before for entry in entries}
    seen = {(each.name, each.role): each for each in sighted}
    # The identities of `fleet edge selftest`, which announce no state.
    probes = {(probe_name(name), IdentityRole.DEVICE) for name, role in known if role is IdentityRole.EDGE}
    unmatched = [
        UnmatchedMachine(
            name=name,
            role=role,
            kind=UnmatchedKind.NEVER_SEEN,
            sentence=f"The {role} {name} has a certificate until {status.not_after:%Y-%m-%d} and was never seen: put "
            f"it into service, or revoke it (`fleet broker revoke {name}`).",
            enrolled_at=begun[status.serial],
        )
        for (name, role), status in sorted(known.items())
        if status.state in _IN_FORCE and (name, role) not in {*seen, *probes}
    ]
    for (name, role), each in sorted(seen.items()):
        status_or_none = known.get((name, role))
        if status_or_none is None or status_or_none.state not in _IN_FORCE:
            unmatched.append(
                UnmatchedMachine(
                    name=name,
                    role=role,
                    kind=UnmatchedKind.NOT_ENROLLED,
                    sentence=f"The {role} {name} was seen last on {each.seen_at:%Y-%m-%d %H:%M} UTC, and "
                    f"{_standing(status_or_none)}.",
                    seen_at=each.seen_at,
                )
            )
    return unmatched


def _standing(status: CertificateStatus | None) -> str:
    if status is None:
        return "this authority has never given it a certificate: another authority has, or the broker asks for none"
    if status.revoked_at is not None:
        return f"its certificate was revoked on {status.revoked_at:%Y-%m-%d}"
    return f"its certificate has ended on {status.not_after:%Y-%m-%d}"
