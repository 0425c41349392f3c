"""Machines that the fleet's authority knows and the log does not, or the other way round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from fleet_common.identity.certificates import IdentityRole
from fleet_common.identity.index import CertificateRecord, CertificateState, standing
from fleet_edge.session_log import SessionLog
from schemas.names import probe_name

NEVER_SEEN: Final = "never-seen"
NOT_ENROLLED: Final = "not-enrolled"

Machine = tuple[str, IdentityRole]

_SPEAKING: Final = frozenset({IdentityRole.DEVICE, IdentityRole.EDGE})
_IN_FORCE: Final = frozenset({CertificateState.VALID, CertificateState.DUE})


@dataclass(frozen=True, slots=True)
class UnmatchedMachine:
    """A machine that only the log or only the authority knows. `sentence` says what to do."""

    name: str
    role: IdentityRole
    kind: str
    sentence: str


def seen_in(log: SessionLog) -> dict[Machine, datetime]:
    devices = {(each.device, IdentityRole.DEVICE): each.seen_at for each in log.devices(counted=False)}
    return devices | {(each.edge, IdentityRole.EDGE): each.seen_at for each in log.edges()}


def find_unmatched(
    entries: Sequence[CertificateRecord], seen: Mapping[Machine, datetime], *, now: datetime
) -> list[UnmatchedMachine]:
    """Find unmatched, those never seen first, each kind by name. `entries` are certificates, oldest first."""
    statuses = {(each.name, each.role): each for each in standing(entries, now=now)}
    enrolled = {key for key, each in statuses.items() if each.state in _IN_FORCE and each.role in _SPEAKING}
    # The identities of `fleet edge selftest`, which announce no state.
    probes = {(probe_name(name), IdentityRole.DEVICE) for name, role in statuses if role is IdentityRole.EDGE}
    never = [
        UnmatchedMachine(
            *key,
            NEVER_SEEN,
            f"The {key[1]} {key[0]} has a certificate until {statuses[key].not_after:%Y-%m-%d} and was never seen: put "
            f"it into service, or revoke it (`fleet broker revoke {key[0]}`).",
        )
        for key in sorted(enrolled - seen.keys() - probes)
    ]
    return never + [
        UnmatchedMachine(
            *key,
            NOT_ENROLLED,
            f"The {key[1]} {key[0]} was seen last on {seen[key]:%Y-%m-%d %H:%M} UTC, and "
            f"{_standing(statuses.get(key))}.",
        )
        for key in sorted(seen.keys() - enrolled)
    ]


def _standing(status: CertificateRecord | None) -> str:
    if status is None:
        return "this authority has never given it a certificate: another authority has, or the broker asks for none"
    if status.revoked_at is not None:
        return f"its certificate was revoked on {status.revoked_at:%Y-%m-%d}"
    return f"its certificate has ended on {status.not_after:%Y-%m-%d}"
