"""Certificate status of each identity: for lists, and for whoever warns of certificates that end soon."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from fleet_identity.certificates import RENEWAL_DAYS
from fleet_identity.index import Entry
from fleet_identity.roles import IdentityRole

__all__ = ["CertificateState", "CertificateStatus", "certificate_statuses"]

DAY_S = 86_400


class CertificateState(StrEnum):
    """What to do about a certificate."""

    VALID = "valid"
    DUE = "due"  # to be renewed now
    ENDED = "ended"
    REVOKED = "revoked"
    REPLACED = "replaced"  # valid, but there is a newer one


@dataclass(frozen=True, slots=True)
class CertificateStatus:
    """One certificate, at one moment.

    Attributes:
        name: Whose.
        role: What for.
        state: What to do about it.
        days_left: Whole days until it ends; negative afterwards.
        not_after: When it ends.
        revoked_at: When it was revoked, or None.
        hosts: A broker's names and addresses.
        serial: In hexadecimal.
    """

    name: str
    role: IdentityRole
    state: CertificateState
    days_left: int
    not_after: datetime
    revoked_at: datetime | None
    hosts: tuple[str, ...]
    serial: str


def certificate_statuses(entries: Iterable[Entry], *, now: datetime, history: bool = False) -> list[CertificateStatus]:
    """Return how certificates stand, by name.

    Args:
        entries: Oldest first.
        now: The time.
        history: Whether to include those that a newer one of the same name replaces.
    """
    found = list(entries)
    newest = {entry.name: entry.serial for entry in found}
    shown = [entry for entry in found if history or newest[entry.name] == entry.serial]
    return [
        CertificateStatus(
            name=entry.name,
            role=entry.role,
            state=_state(entry, now, replaced=newest[entry.name] != entry.serial),
            days_left=int((entry.not_after - now).total_seconds() // DAY_S),
            not_after=entry.not_after,
            revoked_at=entry.revoked_at,
            hosts=entry.hosts,
            serial=entry.serial,
        )
        for entry in sorted(shown, key=lambda entry: entry.name)
    ]


def _state(entry: Entry, now: datetime, *, replaced: bool) -> CertificateState:
    if entry.revoked_at is not None:
        return CertificateState.REVOKED
    if entry.not_after <= now:
        return CertificateState.ENDED
    if replaced:
        return CertificateState.REPLACED
    return CertificateState.DUE if entry.not_after - now <= timedelta(days=RENEWAL_DAYS) else CertificateState.VALID
