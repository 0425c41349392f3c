"""Certificate check of a broker: whether its certificates go together, and for how long."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from broker_config.broker import Tls
from fleet_cli.broker.findings import Finding, Result

SOON: Final = timedelta(days=30)
CHECK: Final = "certificates"

T = TypeVar("T")


class _Unusable(Exception):  # noqa: N818
    """A file that the broker cannot use. Its text is the finding."""


@dataclass(frozen=True, slots=True)
class _Files:
    ca: x509.Certificate
    own: x509.Certificate
    crl: x509.CertificateRevocationList


def check_certificates(tls: Tls, home: Path, *, now: datetime) -> Iterator[Finding]:
    """Yield what there is to say on the files of a listener.

    Args:
        tls: Which they are.
        home: The folder that relative paths start from.
        now: The time (UTC).
    """
    paths = [home / path for path in (tls.ca, tls.certificate, tls.key, tls.crl)]
    missing = [str(path) for path in paths if not path.exists()]
    if len(missing) == len(paths):
        yield Finding(CHECK, Result.SKIPPED, f"They are not on this machine ({home}); the trial made its own.")
        return
    if missing:
        yield Finding(CHECK, Result.FAILED, f"{', '.join(missing)} is missing: put it there, or correct the paths.")
        return
    try:
        files = _read(*paths)
        _together(files, paths)
        yield _lifetimes(files, paths, now)
    except _Unusable as error:
        yield Finding(CHECK, Result.FAILED, str(error))


def _read(ca: Path, certificate: Path, key: Path, crl: Path) -> _Files:
    own = _load(certificate, "certificate", x509.load_pem_x509_certificate)
    private = _load(key, "unencrypted private key", lambda pem: serialization.load_pem_private_key(pem, None))
    if _public(private.public_key()) != _public(own.public_key()):
        raise _Unusable(f"The key {key} does not belong to the certificate {certificate}: put the right one there.")
    return _Files(
        _load(ca, "certificate", x509.load_pem_x509_certificate),
        own,
        _load(crl, "revocation list", x509.load_pem_x509_crl),
    )


def _load(path: Path, what: str, load: Callable[[bytes], T]) -> T:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise _Unusable(f"{path} cannot be read: {error.strerror}; check who may read it.") from error
    except (ValueError, TypeError) as error:
        raise _Unusable(f"{path} is no {what} in PEM: put the right file there.") from error


def _together(files: _Files, paths: list[Path]) -> None:
    key = files.ca.public_key()
    try:
        files.own.verify_directly_issued_by(files.ca)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise _Unusable(f"{paths[1]} was not signed by {paths[0]}: clients that trust that file refuse it.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise _Unusable(f"{paths[0]} has no elliptic-curve key: the listener's ciphers need one.")
    if not files.crl.is_signature_valid(key):
        raise _Unusable(f"{paths[3]} was not signed by {paths[0]}: the broker would refuse every client.")


def _lifetimes(files: _Files, paths: list[Path], now: datetime) -> Finding:
    ends = {
        paths[0]: files.ca.not_valid_after_utc,
        paths[1]: files.own.not_valid_after_utc,
        paths[3]: files.crl.next_update_utc or now + SOON,
    }
    begins = {paths[0]: files.ca.not_valid_before_utc, paths[1]: files.own.not_valid_before_utc}
    for path, begin in begins.items():
        if now < begin:
            raise _Unusable(f"{path} is valid from {begin:%Y-%m-%d %H:%M} on: set this machine's clock, or renew it.")
    for path, end in ends.items():
        if end <= now:
            raise _Unusable(f"{path} ran out on {end:%Y-%m-%d}: renew it, or the broker serves nobody.")
    path, end = min(ends.items(), key=lambda item: item[1])
    return Finding(CHECK, Result.OK, f"They go together; the first to end is {path}, on {end:%Y-%m-%d}.")


def _public(key: object) -> bytes:
    assert hasattr(key, "public_bytes")
    encoded: bytes = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return encoded
