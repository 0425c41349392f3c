"""Certificates and revocation lists: every field is ours, none is copied from a request.

A role is in the subject (`OU`), where the authority's own index has it too. The extended key usage keeps the two sides
apart: a device's certificate is no server's, so a stolen one cannot play the broker.

A `Revocation` carries certificates that exist to end the sessions of a revoked one. A broker looks at a certificate
once, when a client connects: one that is revoked while connected stays connected. What ends its session, without a
plugin and without touching anybody else's, is the protocol's own rule that of two clients with one client id the
older goes. The broker takes the client id from the certificate, so whoever holds a certificate of that name can end
the session: the authority makes one, valid for an hour, its key never on a disk in the clear.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleet_identity.errors import CertificateRefused, NameRefused
from fleet_identity.files import read_bounded
from fleet_identity.roles import IdentityRole

__all__ = [
    "CERTIFICATE_DAYS",
    "RENEWAL_DAYS",
    "SKEW",
    "TAKEOVER_LIFETIME",
    "Credential",
    "Revocation",
    "Revoked",
    "Subject",
    "authority_certificate",
    "certificate",
    "load_certificate",
    "revocation_list",
    "subject_of",
]

CERTIFICATE_DAYS: Final = 90
RENEWAL_DAYS: Final = 30
AUTHORITY_DAYS: Final = 3650
SKEW: Final = timedelta(hours=1)  # a clock that is behind by less sees a new certificate as valid
MAX_HOST_LENGTH: Final = 253

_HOST_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a certificate names.

    Attributes:
        fleet: The organization.
        role: The organizational unit.
        name: The common name: the broker's user name and client id.
        hosts: For a broker, the host names and addresses that it is reached by.
    """

    fleet: str
    role: IdentityRole
    name: str
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Revoked:
    """A line of the revocation list."""

    serial: int
    at: datetime


def authority_certificate(key: ec.EllipticCurvePrivateKey, *, fleet: str, now: datetime) -> x509.Certificate:
    """Return the self-signed certificate of a fleet's authority, which may sign identities but no other authority."""
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet),
            x509.NameAttribute(NameOID.COMMON_NAME, "fleet authority"),
        ]
    )
    public = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )


def certificate(
    subject: Subject,
    public_key: ec.EllipticCurvePublicKey,
    *,
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    lifetime: timedelta = timedelta(days=CERTIFICATE_DAYS),
) -> x509.Certificate:
    """Return a signed certificate for one identity.

    Raises:
        NameRefused: A host name is malformed, or a broker has none.
    """
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if subject.role.is_server else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        x509.CertificateBuilder()
        .subject_name(
            x509.Name(
                [
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, subject.fleet),
                    x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, subject.role.value),
                    x509.NameAttribute(NameOID.COMMON_NAME, subject.name),
                ]
            )
        )
        .issuer_name(issuer.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(min(now + lifetime, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if subject.role.is_server:
        builder = builder.add_extension(_alternative_names(subject.hosts), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def revocation_list(
    revoked: Iterable[Revoked],
    *,
    number: int,
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    this_update: datetime,
) -> x509.CertificateRevocationList:
    """Return the signed list of revoked serials.

    It is valid as long as the authority: a broker turns *everybody* away when its list has run out, which would make a
    forgotten chore into an outage. That the newest list is in force is proven at each revocation instead.
    """
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(this_update)
        .next_update(issuer.not_valid_after_utc)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    for line in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(line.serial).revocation_date(line.at).build()
        )
    return builder.sign(issuer_key, hashes.SHA256())


def load_certificate(path: Path, what: str = "The certificate") -> x509.Certificate:
    """Read the first certificate of a PEM file.

    Raises:
        IdentityError: The file cannot be read.
        CertificateRefused: It holds no certificate.
    """
    content = read_bounded(path, what)
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise CertificateRefused(f"{what} {path} is no certificate in PEM.") from error


def subject_of(found: x509.Certificate) -> Subject:
    """Return whom a certificate of ours names.

    Raises:
        CertificateRefused: It has not the fields of ours.
    """
    try:
        return Subject(
            fleet=_only(found.subject, NameOID.ORGANIZATION_NAME),
            role=IdentityRole(_only(found.subject, NameOID.ORGANIZATIONAL_UNIT_NAME)),
            name=_only(found.subject, NameOID.COMMON_NAME),
        )
    except ValueError as error:
        raise CertificateRefused(
            "The certificate does not say fleet, role and name: it was not made by a fleet's authority."
        ) from error


def _only(name: x509.Name, oid: x509.ObjectIdentifier) -> str:
    (attribute,) = name.get_attributes_for_oid(oid)
    return str(attribute.value)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    if not hosts:
        raise NameRefused("A broker needs at least one host name or address by which clients reach it (--host).")
    return x509.SubjectAlternativeName([_general_name(host) for host in hosts])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    if len(host) > MAX_HOST_LENGTH or not all(_HOST_LABEL.fullmatch(label) for label in labels):
        raise NameRefused(
            f"{host[:80]!r} is neither a host name nor an address: wildcards and ports do not belong here."
        )
    return x509.DNSName(host)


TAKEOVER_LIFETIME: Final = timedelta(hours=1)  # the broker's clock may be ahead by nearly that


@dataclass(frozen=True, slots=True)
class Credential:
    """A certificate and its key, in memory.

    Attributes:
        name: Whom it names.
        certificate: In PEM.
        key: Private.
    """

    name: str
    certificate: bytes
    key: ec.EllipticCurvePrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class Revocation:
    """What it takes to make a revocation felt.

    Attributes:
        serials: The certificates revoked, in hexadecimal.
        revocation_list: The new list, in PEM.
        authority: The authority's certificate, in PEM.
        canary: A certificate that this list revokes: a broker that refuses it goes by this list or a later one.
        kickers: For every revoked client a certificate that is *not* revoked.
    """

    serials: tuple[str, ...]
    revocation_list: bytes
    authority: bytes
    canary: Credential
    kickers: Mapping[str, Credential]
