"""Folder of an authority, which only its owner may enter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet_identity.certificates import load_certificate
from fleet_identity.errors import AuthorityError
from fleet_identity.files import PUBLIC, locked, write_atomically
from fleet_identity.keys import Passphrase, is_encrypted, load_key, same_key

__all__ = ["AuthorityFolder"]


@dataclass(frozen=True, slots=True)
class AuthorityFolder:
    """The files of an authority.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def certificate(self) -> Path:
        """The authority's own certificate, for everybody's `ca` setting."""
        return self.path / "ca.pem"

    @property
    def key(self) -> Path:
        """Its private key: who has it can make any identity."""
        return self.path / "ca.key"

    @property
    def revocation_list(self) -> Path:
        """The list of revoked certificates, for the broker."""
        return self.path / "crl.pem"

    @property
    def index(self) -> Path:
        """What was signed, and for whom."""
        return self.path / "index.sqlite3"

    @property
    def audit(self) -> Path:
        """Who did what."""
        return self.path / "audit.jsonl"

    @property
    def broker(self) -> Path:
        """How to reach the broker that revocations are told to."""
        return self.path / "broker.json"

    @property
    def issued(self) -> Path:
        """Where certificates go unless the operator says otherwise."""
        return self.path / "issued"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands out.

        Raises:
            AuthorityError: Another one is at work for too long.
        """
        with locked(self.path / ".lock"):
            yield

    def load_certificate(self) -> x509.Certificate:
        """Return the authority's certificate.

        Raises:
            AuthorityError: There is no authority here.
            IdentityError: The file cannot be used.
        """
        if not self.certificate.exists():
            raise AuthorityError(
                f"There is no authority in {self.path}: make one with `fleet broker ca`, or correct --ca."
            )
        return load_certificate(self.certificate, "The authority's certificate")

    def load_key(
        self, certificate: x509.Certificate, passphrase: Callable[[], Passphrase]
    ) -> ec.EllipticCurvePrivateKey:
        """Return the authority's key.

        Args:
            certificate: Which it must belong to.
            passphrase: Asked only if the key is encrypted.

        Raises:
            AuthorityError: It is missing, open to others, or belongs to another certificate.
            IdentityError: It cannot be used.
        """
        if not self.key.exists():
            raise AuthorityError(
                f"The authority's key {self.key} is missing: put it back from where it is kept; without it nothing can "
                "be signed or revoked."
            )
        if self.key.stat().st_mode & 0o077:
            raise AuthorityError(
                f"Others may read the authority's key {self.key}: make it yours alone (chmod 600), and think of who "
                "has had it."
            )
        key = load_key(self.key, passphrase() if is_encrypted(self.key) else None)
        if not same_key(key.public_key(), certificate.public_key()):
            raise AuthorityError(f"The key {self.key} does not belong to {self.certificate}: put back the two that do.")
        return key

    def write_certificate(self, path: Path, certificate: x509.Certificate) -> None:
        """Write a certificate where everybody may read it.

        Raises:
            IdentityError: It cannot be written.
        """
        write_atomically(path, certificate.public_bytes(serialization.Encoding.PEM), mode=PUBLIC)

    def write_revocation_list(self, revocations: x509.CertificateRevocationList) -> None:
        """Write the list of revoked certificates.

        Raises:
            IdentityError: It cannot be written.
        """
        write_atomically(self.revocation_list, revocations.public_bytes(serialization.Encoding.PEM), mode=PUBLIC)
