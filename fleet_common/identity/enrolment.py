"""Enrolment of a device: create a key that never leaves it, send a request, install the certificate.

A certificate is checked before it is installed. Without the check, a device with another device's certificate, or
with one that is not valid by its own clock, would only see a broker that closes the connection without a reason.
"""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from fleet_common.identity.certificates import (
    IdentityRole,
    check_identity_name,
    load_certificate,
    load_key,
    make_request,
    new_key,
    same_key,
    save_key,
    subject_of,
)
from fleet_common.identity.files import PUBLIC, CertificateRefused, SigningRefused, make_folder, write_atomically

_AUTHORITY: Final = "The authority's certificate"


class Enrolment:
    """Credentials folder of a device, readable by the device's user only.

    `next_key` replaces the current key when its certificate arrives.
    """

    def __init__(self, folder: Path, name: str, clock: Callable[[], datetime]) -> None:
        self.folder, self.name, self.clock = folder, name, clock
        self.key, self.next_key = folder / "device.key", folder / "next.key"
        self.request, self.certificate = folder / "device.csr", folder / "device.pem"
        self.ca = folder / "ca.pem"

    def ask(self, *, fresh: bool = False) -> Path:
        """Write a signing request and return its path; may be repeated.

        `fresh` creates a new key, which an enrolled device starts to use together with its new certificate. Raise
        InvalidName, NameRefused or IdentityError.
        """
        check_identity_name(self.name, IdentityRole.DEVICE)
        make_folder(self.folder)
        path = self.key
        if fresh and self.certificate.exists():
            path = self.next_key
        if fresh or not path.exists():
            save_key(path, new_key())
        write_atomically(self.request, make_request(load_key(path), self.name), mode=PUBLIC)
        return self.request

    def install(self, certificate: Path, ca: Path | None = None) -> x509.Certificate:
        """Check and install a certificate; a running device switches to it without a restart.

        `ca` is by default the one installed before. Raise SigningRefused if there is no key yet, CertificateRefused if
        the certificate is not for this device, this key or this time, or not from this authority.
        """
        signed = load_certificate(certificate)
        authority = self._authority(ca)
        key = self._key_of(signed)
        self._check_subject(signed)
        self._check_issuer(signed, authority)
        self._check_time(signed)
        write_atomically(self.ca, authority.public_bytes(serialization.Encoding.PEM), mode=PUBLIC)
        # A device that reads the files in between sees a key that does not match the certificate, and waits.
        if key == self.next_key:
            self.next_key.replace(self.key)
        write_atomically(self.certificate, signed.public_bytes(serialization.Encoding.PEM), mode=PUBLIC)
        return signed

    def _authority(self, ca: Path | None) -> x509.Certificate:
        known = load_certificate(self.ca, _AUTHORITY) if self.ca.exists() else None
        if ca is None:
            if known is None:
                raise CertificateRefused(
                    "The authority's certificate is needed too, the first time: give it with --ca."
                )
            return known
        given = load_certificate(ca, _AUTHORITY)
        if known is not None and given != known:
            # Write access to the CA file would be enough to impersonate the broker.
            raise CertificateRefused(
                f"{ca} is not the authority that this device knows: if the fleet really has a new one, "
                f"remove {self.ca}."
            )
        return given

    def _key_of(self, signed: x509.Certificate) -> Path:
        held = [path for path in (self.key, self.next_key) if path.exists()]
        if not held:
            raise SigningRefused(f"There is no key in {self.folder} yet: run the command without --certificate first.")
        for path in held:
            if same_key(load_key(path).public_key(), signed.public_key()):
                return path
        raise CertificateRefused(
            f"The certificate is not for the key in {self.folder}: have the request in that folder signed, "
            f"{self.request}."
        )

    def _check_subject(self, signed: x509.Certificate) -> None:
        subject = subject_of(signed)
        if subject.name != self.name or subject.role is not IdentityRole.DEVICE:
            raise CertificateRefused(
                f"The certificate is for the {subject.role} {subject.name[:80]!r} and not for the device "
                f"{self.name!r}: ask the operator for the right one."
            )
        try:
            purposes = signed.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except (x509.ExtensionNotFound, ValueError):
            purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        if ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
            raise CertificateRefused("The certificate is not for a client: ask the operator for the right one.")

    def _check_issuer(self, signed: x509.Certificate, authority: x509.Certificate) -> None:
        try:
            signed.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise CertificateRefused(
                "The certificate was not signed by the authority whose certificate came with it: ask the "
                "operator for both."
            ) from error

    def _check_time(self, signed: x509.Certificate) -> None:
        now, begins, ends = self.clock(), signed.not_valid_before_utc, signed.not_valid_after_utc
        if now < begins:
            raise CertificateRefused(
                f"The certificate is valid from {begins:%Y-%m-%d %H:%M} (UTC) and this device's clock says "
                f"{now:%Y-%m-%d %H:%M}: set the clock."
            )
        if now >= ends:
            raise CertificateRefused(
                f"The certificate ended at {ends:%Y-%m-%d %H:%M} (UTC) and this device's clock says "
                f"{now:%Y-%m-%d %H:%M}: have it renewed, or set the clock."
            )
