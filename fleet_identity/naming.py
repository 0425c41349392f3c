"""Who may have which name and which key, by what the index remembers."""

from datetime import datetime, timedelta

from fleet_identity.certificates import RENEWAL_DAYS
from fleet_identity.errors import NameRefused, RequestRefused
from fleet_identity.index import Entry, Index
from fleet_identity.roles import IdentityRole

__all__ = ["check_free", "check_key", "current", "renewable"]


def check_free(index: Index, name: str, role: IdentityRole) -> None:
    """Refuse a name that another role has or had, or that differs from a known one in case alone.

    Raises:
        NameRefused: It does.
    """
    owner = index.owner(name)
    if owner is not None and owner != (name, role):
        known, known_role = owner
        raise NameRefused(
            f"The name {name!r} cannot be given to the role {role}: {known!r} belongs to the role {known_role}; "
            "choose another."
        )


def check_key(index: Index, key_sha256: str, name: str) -> None:
    """Refuse a key that was revoked, or that somebody else has.

    Raises:
        RequestRefused: It must have no further certificate.
    """
    for entry in index.of_key(key_sha256):
        if entry.revoked_at is not None:
            raise RequestRefused(
                f"The key of this request was revoked with a certificate of {entry.name!r}: make a new key "
                "(`fleet device enroll --new-key`)."
            )
        if entry.name != name:
            raise RequestRefused(f"The key of this request is that of {entry.name!r}: every device makes its own.")


def current(index: Index, name: str, *, now: datetime) -> Entry | None:
    """Return the certificate of this name that ends last, if one is in force."""
    entries = [entry for entry in index.of_name(name) if entry.revoked_at is None and entry.not_after > now]
    return max(entries, key=lambda entry: entry.not_after, default=None)


def renewable(index: Index, name: str, *, now: datetime, early: bool) -> Entry:
    """Return the certificate to renew; one that has run out by itself may be.

    Raises:
        NameRefused: Nobody has that name, it was revoked, or there is time left.
    """
    known = index.of_name(name)
    if not known:
        raise NameRefused(
            f"Nobody has a certificate for {name[:80]!r}: see `fleet broker list`, or sign a request for it."
        )
    kept = [entry for entry in known if entry.revoked_at is None]
    if not kept:
        raise NameRefused(f"{name!r} was revoked: it needs a new key and a new request (`fleet broker sign`).")
    latest = max(kept, key=lambda entry: entry.not_after)
    if latest.not_after - now > timedelta(days=RENEWAL_DAYS) and not early:
        raise NameRefused(
            f"The certificate of {name!r} is valid until {latest.not_after:%Y-%m-%d}: it is renewed in its last "
            f"{RENEWAL_DAYS} days, or now with --early."
        )
    return latest
