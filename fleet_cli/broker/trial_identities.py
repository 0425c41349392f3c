"""Trial certificates that live for an hour, good ones and every kind of bad one, to try a broker with."""

import ipaddress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker_config.processes import IdentityFiles

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
HOST = "127.0.0.1"


@dataclass(slots=True)
class TrialAuthority:
    """An authority in a folder of its own, which signs whatever it is asked to.

    The fleet's own authority refuses what cannot be a name; a broker has to be tried with just that.

    Attributes:
        folder: Where its files lie; made if it is not there.
        now: The time (UTC).
    """

    folder: Path
    now: datetime
    _key: ec.EllipticCurvePrivateKey = field(init=False)
    _certificate: x509.Certificate = field(init=False)
    _revoked: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._key = _new_key()
        name = _name("trial authority")
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        self._certificate = (
            self._builder(name, self._key.public_key(), DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        (self.folder / "ca.pem").write_bytes(self._certificate.public_bytes(Encoding.PEM))
        self._write_crl()

    def broker(self) -> IdentityFiles:
        """Make the certificate of a broker on loopback."""
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
        return self._issue("localhost", "broker", x509.SubjectAlternativeName(names), ExtendedKeyUsageOID.SERVER_AUTH)

    def client(self, name: str, *, file: str | None = None, begins: timedelta = -HOUR) -> IdentityFiles:
        """Make a client's certificate, valid for a day.

        Args:
            name: Its common name.
            file: Under which name its files are kept.
            begins: When it becomes valid, from now.
        """
        return self._issue(name, file or name, None, ExtendedKeyUsageOID.CLIENT_AUTH, begins=begins)

    def revoke(self, files: IdentityFiles) -> None:
        """Enter a certificate into the revocation list, which a running broker reads at a reload."""
        self._revoked.append(x509.load_pem_x509_certificate(files.certificate.read_bytes()).serial_number)
        self._write_crl()

    def _issue(
        self,
        name: str,
        file: str,
        alternative: x509.SubjectAlternativeName | None,
        purpose: x509.ObjectIdentifier,
        *,
        begins: timedelta = -HOUR,
    ) -> IdentityFiles:
        key = _new_key()
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            self._builder(_name(name), key.public_key(), DAY, begins=begins)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(identifier, critical=False)
        )
        if alternative is not None:
            builder = builder.add_extension(alternative, critical=False)
        files = IdentityFiles(self.folder / "ca.pem", self.folder / f"{file}.pem", self.folder / f"{file}.key")
        files.certificate.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))
        files.key.touch(mode=0o600)
        files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return files

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, lives: timedelta, *, begins: timedelta = -HOUR
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(_name("trial authority"))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now + begins)
            .not_valid_after(self.now + begins + lives)
        )

    def _write_crl(self) -> None:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(self.now - HOUR)
            .next_update(self.now + DAY)
        )
        for serial in self._revoked:
            revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(self.now - HOUR)
            builder = builder.add_revoked_certificate(revoked.build())
        (self.folder / "crl.pem").write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
