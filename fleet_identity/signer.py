"""Signs and records: index, key and audit log of an authority in one hand, while its folder's lock is held."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet_identity.certificates import (
    SKEW,
    TAKEOVER_LIFETIME,
    Credential,
    Revoked,
    Subject,
    certificate,
    revocation_list,
)
from fleet_identity.files import append_line
from fleet_identity.folder import AuthorityFolder
from fleet_identity.index import Entry, Index
from fleet_identity.keys import fingerprint, new_key

__all__ = ["Audit", "Signer"]


@dataclass(frozen=True, slots=True)
class Audit:
    """The audit log of an authority.

    Attributes:
        path: The file; an operator may make it append-only for the file system too.
        actor: Who acts, as the system knows him.
        clock: Now, with its time zone.
    """

    path: Path
    actor: str
    clock: Callable[[], datetime]

    def record(self, action: str, *, name: str, role: str, serial: str = "", detail: str = "") -> None:
        """Append a line. What is not recorded does not happen: call it before a certificate is handed out.

        Raises:
            IdentityError: The log cannot be written.
        """
        line = {
            "at": self.clock().isoformat(timespec="seconds"),
            "actor": self.actor,
            "action": action,
            "name": name,
            "role": role,
            "serial": serial,
            "detail": detail,
        }
        append_line(self.path, json.dumps({key: value for key, value in line.items() if value}))


CLOCKS_APART: Final = timedelta(days=1)  # a revoked certificate stays listed this long after its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """Signs what was decided elsewhere, and records it.

    Attributes:
        folder: The authority's files.
        certificate: Its certificate.
        key: Its key.
        index: What it has signed.
        audit: Its log.
        clock: Now, with its time zone.
    """

    folder: AuthorityFolder
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    index: Index
    audit: Audit
    clock: Callable[[], datetime]

    def certify(self, subject: Subject, public_key: ec.EllipticCurvePublicKey, *, action: str) -> Entry:
        """Sign a certificate; on return it is in the index and in the log."""
        signed = certificate(subject, public_key, issuer=self.certificate, issuer_key=self.key, now=self.clock())
        entry = _entry(signed, subject)
        with self.index.change():
            self.index.keep_name(subject.name, subject.role)
            self.index.add(entry)
            self.audit.record(
                action, name=subject.name, role=subject.role, serial=entry.serial, detail=" ".join(subject.hosts)
            )
        return entry

    def take_over(self, subject: Subject, *, revoked: bool) -> Credential:
        """Return a certificate with which we can connect under another's name for a short time.

        Args:
            subject: Whose name.
            revoked: Whether the next list already revokes it.
        """
        key = new_key()
        signed = certificate(
            subject,
            key.public_key(),
            issuer=self.certificate,
            issuer_key=self.key,
            now=self.clock(),
            lifetime=TAKEOVER_LIFETIME,
        )
        entry = _entry(signed, subject, takeover=True, revoked_at=self.clock() if revoked else None)
        with self.index.change():
            self.index.add(entry)
            self.audit.record("take over", name=subject.name, role=subject.role, serial=entry.serial)
        return Credential(subject.name, signed.public_bytes(serialization.Encoding.PEM), key)

    def write_list(self) -> bytes:
        """Write a new list of all that is revoked, and return it in PEM."""
        now = self.clock()
        with self.index.change():
            # An hour back: a broker whose clock is behind takes no list from its future, and then lets nobody in.
            number, this_update = self.index.next_list(now - SKEW)
            revoked = [
                Revoked(int(entry.serial, 16), entry.revoked_at or now)
                for entry in self.index.revoked(ending_after=now - CLOCKS_APART)
            ]
            self.audit.record("list", name="", role="", detail=f"number {number} with {len(revoked)} revoked")
        made = revocation_list(
            revoked, number=number, issuer=self.certificate, issuer_key=self.key, this_update=this_update
        )
        self.folder.write_revocation_list(made)
        return made.public_bytes(serialization.Encoding.PEM)


def _entry(
    signed: x509.Certificate, subject: Subject, *, takeover: bool = False, revoked_at: datetime | None = None
) -> Entry:
    return Entry(
        serial=f"{signed.serial_number:x}",
        name=subject.name,
        role=subject.role,
        hosts=subject.hosts,
        key_sha256=fingerprint(signed.public_key()),
        not_before=signed.not_valid_before_utc,
        not_after=signed.not_valid_after_utc,
        pem=signed.public_bytes(serialization.Encoding.PEM).decode(),
        takeover=takeover,
        revoked_at=revoked_at,
    )
