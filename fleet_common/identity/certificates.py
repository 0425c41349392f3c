"""Roles and names, keys, signing requests, certificates and revocation lists.

The broker grants rights by name alone: a device with an edge's name could read every draft of the fleet. Two rules
keep the roles apart. A word that names a role is reserved for that role, and a name that was given to one role is never
given to another (`fleet_common.identity.index` records them).

Every field of a certificate is set here; none is copied from a request. The role is in the subject (`OU`). The
extended key usage separates clients from servers, so that a stolen device certificate cannot impersonate the broker.

A broker checks a certificate only when a client connects, so a revoked client that is connected stays connected. MQTT
ends the older of two sessions with one client id, and the broker takes the client id from the certificate. An
`AccessChange` therefore carries certificates of the names, valid for an hour, whose keys never reach a disk in the
clear: connecting with one ends the session of that name and no other.
"""

import hashlib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleet_common.identity.files import (
    SECRET,
    CertificateRefused,
    NameRefused,
    SigningRefused,
    read_bounded,
    write_atomically,
)
from schemas.names import check_name


class IdentityRole(StrEnum):
    DEVICE = "device"
    EDGE = "edge"
    MONITOR = "monitor"
    BROKER = "broker"  # the only one that is a server

    @property
    def is_server(self) -> bool:
        return self is IdentityRole.BROKER


# A reader of a log takes `edge`, `edge-1` or `edge.north` for an edge.
_RESERVED: Final = (IdentityRole.EDGE, IdentityRole.MONITOR, IdentityRole.BROKER)
_SEPARATORS: Final = "-._"


def folded(name: str) -> str:
    """Return the form in which names are compared: people confuse names that differ in case only."""
    return name.casefold()


def check_identity_name(name: str, role: IdentityRole) -> str:
    """Return `name` if an identity of this role may have it, else raise InvalidName or NameRefused."""
    check_name(name)
    for owner in _RESERVED:
        same_word = folded(name) == owner or folded(name).startswith(tuple(owner + mark for mark in _SEPARATORS))
        if same_word and role is not owner:
            raise NameRefused(
                f"The name {name!r} is reserved: a name that begins with '{owner}' belongs to {_article(owner)}; "
                f"choose another for {_article(role)}."
            )
    return name


def _article(role: IdentityRole) -> str:
    return f"an {role}" if role[0] in "aeiou" else f"a {role}"


CERTIFICATE_DAYS: Final = 90
RENEWAL_DAYS: Final = 30
AUTHORITY_DAYS: Final = 3650
SKEW: Final = timedelta(hours=1)  # a clock that is behind by less sees a new certificate as valid
MAX_HOST_LENGTH: Final = 253

_HOST_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Subject:
    """Subject of a certificate.

    `name` is the broker's user name and client id; `hosts` are a broker's names and addresses.
    """

    fleet: str
    role: IdentityRole
    name: str
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Revoked:
    serial: int
    at: datetime
    held: bool = False  # until it is lifted, rather than for good


def authority_certificate(key: ec.EllipticCurvePrivateKey, *, fleet: str, now: datetime) -> x509.Certificate:
    """Return a self-signed CA certificate that may sign identities but no other CA."""
    name = _name((NameOID.ORGANIZATION_NAME, fleet), (NameOID.COMMON_NAME, "fleet authority"))
    builder = _builder(name, key.public_key(), name, key.public_key(), now, timedelta(days=AUTHORITY_DAYS), ca=True)
    return builder.sign(key, hashes.SHA256())


def certificate(
    subject: Subject,
    public_key: ec.EllipticCurvePublicKey,
    *,
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    lifetime: timedelta = timedelta(days=CERTIFICATE_DAYS),
) -> x509.Certificate:
    """Return a signed certificate; raise NameRefused if a host name is malformed or a broker has none."""
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if subject.role.is_server else ExtendedKeyUsageOID.CLIENT_AUTH
    name = _name(
        (NameOID.ORGANIZATION_NAME, subject.fleet),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, subject.role.value),
        (NameOID.COMMON_NAME, subject.name),
    )
    lifetime = min(lifetime, issuer.not_valid_after_utc - now)
    builder = _builder(name, public_key, issuer.subject, issuer_key.public_key(), now, lifetime, ca=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    if subject.role.is_server:
        if not subject.hosts:
            raise NameRefused("A broker needs at least one host name or address by which clients reach it (--host).")
        names = x509.SubjectAlternativeName([_general_name(host) for host in subject.hosts])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _name(*attributes: tuple[x509.ObjectIdentifier, str]) -> x509.Name:
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])


def _builder(
    name: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePublicKey,
    now: datetime,
    lifetime: timedelta,
    *,
    ca: bool,
) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + lifetime)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def revocation_list(
    revoked: Iterable[Revoked],
    *,
    number: int,
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    this_update: datetime,
) -> x509.CertificateRevocationList:
    """Return the signed list of revoked serial numbers.

    It is valid as long as the authority: a broker refuses *every* client once its list has expired, so a forgotten
    chore would become an outage. Each revocation proves that the newest list is in force.
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
        entry = x509.RevokedCertificateBuilder().serial_number(line.serial).revocation_date(line.at)
        if line.held:
            entry = entry.add_extension(x509.CRLReason(x509.ReasonFlags.certificate_hold), critical=False)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(issuer_key, hashes.SHA256())


def load_certificate(path: Path, what: str = "The certificate") -> x509.Certificate:
    """Read the first certificate of a PEM file, described as `what` in errors."""
    content = read_bounded(path, what)
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise CertificateRefused(f"{what} {path} is no certificate in PEM.") from error


def subject_of(found: x509.Certificate) -> Subject:
    """Return a certificate's subject; raise CertificateRefused if it lacks the expected fields."""
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
    name: str
    certificate: bytes
    key: ec.EllipticCurvePrivateKey = field(repr=False)


class AccessAction(StrEnum):
    """Change that an administrator makes to the access of identities at the broker."""

    DISCONNECT = "disconnect"  # ends the session; a new one may begin at once
    SUSPEND = "suspend"  # also refuses the certificates until lifted (RFC 5280: certificateHold)
    UNSUSPEND = "unsuspend"
    REVOKE = "revoke"

    @property
    def done(self) -> str:
        """State of an identity after the change; the code of the event."""
        return {"disconnect": "disconnected", "revoke": "revoked"}.get(self.value, f"{self.value}ed")


@dataclass(frozen=True, slots=True)
class AccessChange:
    """Data to enforce a change of access at the broker.

    Attributes:
        serials: Certificates that the action concerns.
        revocation_list: None if the action changes no list.
        canary: Certificate that only this list revokes: a broker that refuses it uses this list or a later one.
        kickers: For each client whose session is to end, a certificate that is *not* revoked.
    """

    serials: tuple[str, ...]
    revocation_list: bytes | None
    authority: bytes
    canary: Credential | None
    kickers: Mapping[str, Credential]


Passphrase = bytes | None

_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


def new_key() -> ec.EllipticCurvePrivateKey:
    """Generate an EC P-256 key: every TLS library and most secure elements support that curve."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey, passphrase: Passphrase = None) -> bytes:
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        how = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def save_key(path: Path, key: ec.EllipticCurvePrivateKey, passphrase: Passphrase = None) -> None:
    """Write the key with permissions for its owner only; raise IdentityError if it cannot."""
    write_atomically(path, key_pem(key, passphrase), mode=SECRET)


def is_encrypted(path: Path) -> bool:
    return _ENCRYPTED in read_bounded(path, "The private key")


def load_key(path: Path, passphrase: Passphrase = None) -> ec.EllipticCurvePrivateKey:
    """Read a private key; raise CertificateRefused for another kind of key, or a wrong or missing passphrase."""
    content = read_bounded(path, "The private key")
    encrypted = _ENCRYPTED in content
    if encrypted and passphrase is None:
        raise CertificateRefused(f"The private key {path} is encrypted: give its passphrase.")
    try:
        key = serialization.load_pem_private_key(content, passphrase if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        why = "the passphrase is wrong" if encrypted else "it is no private key in PEM"
        raise CertificateRefused(f"The private key {path} cannot be used: {why}.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CertificateRefused(f"The private key {path} is of another kind: only EC P-256 is used.")
    return key


def fingerprint(key: object) -> str:
    """Return the SHA-256 of an EC P-256 public key in hexadecimal; raise CertificateRefused for others."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CertificateRefused("The key is of another kind: only EC P-256 is used.")
    encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).hexdigest()


def same_key(one: object, other: object) -> bool:
    return fingerprint(one) == fingerprint(other)


def make_request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """Return a signing request for `name` in PEM, signed with the key that it is for."""
    subject = _name((NameOID.COMMON_NAME, check_name(name)))
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def load_request(path: Path) -> x509.CertificateSigningRequest:
    """Read a signing request without checking it."""
    content = read_bounded(path, "The signing request")
    try:
        return x509.load_pem_x509_csr(content)
    except ValueError as error:
        raise SigningRefused(
            f"{path} is no signing request in PEM: make one on the device with `fleet device enroll`."
        ) from error


def requested_name(request: x509.CertificateSigningRequest) -> str:
    """Return the name in an unchecked request; raise SigningRefused if it has none or several."""
    try:
        names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        (name,) = names
    except ValueError as error:
        raise SigningRefused("The signing request does not ask for exactly one common name.") from error
    return str(name.value)


def check_request(request: x509.CertificateSigningRequest, *, name: str) -> ec.EllipticCurvePublicKey:
    """Check a hostile signing request and return its public key, the only part of it that is used.

    Raise SigningRefused if it is not for `name`, has another kind of key, or was not signed with that key.
    """
    asked = requested_name(request)
    if asked != name:
        raise SigningRefused(
            f"The signing request asks for {asked[:80]!r} and not for {name!r}: sign it for no other name."
        )
    try:
        key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise SigningRefused(
            "The signing request has a key or a signature of an unknown kind: use EC P-256."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise SigningRefused("The signing request has a key of another kind: only EC P-256 is signed.")
    if not signed:
        raise SigningRefused(
            "The signing request was not signed with the key that it asks for: it was changed on its way."
        )
    return key
