"""Check of a folder of rendered broker files: who may read them, and whether certificates and keys go together."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from broker_config.broker import BrokerFilesError, Tls, read_description
from broker_config.files import DESCRIPTION_FILE
from broker_config.mosquitto import ACCESS_FILE, CONF_FILE
from fleet_common.checks import Check, Checklist, NotApplicable

SOON: Final = timedelta(days=30)

T = TypeVar("T")


def check_certificates(tls: Tls, home: Path, *, now: datetime) -> str:
    """Check the files of a listener; relative paths are relative to `home`."""
    paths = [home / path for path in (tls.ca, tls.certificate, tls.key, tls.crl)]
    missing = [str(path) for path in paths if not path.exists()]
    if len(missing) == len(paths):
        raise NotApplicable(f"They are not on this machine ({home}).")
    if missing:
        raise BrokerFilesError(f"{', '.join(missing)} is missing: put it there, or correct the paths.")
    return _valid_together(*paths, now=now)


def _load(path: Path, what: str, load: Callable[[bytes], T]) -> T:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise BrokerFilesError(f"{path} cannot be read: {error.strerror}; check who may read it.") from error
    except (ValueError, TypeError) as error:
        raise BrokerFilesError(f"{path} is no {what} in PEM: put the right file there.") from error


def _valid_together(ca: Path, certificate: Path, key: Path, crl: Path, *, now: datetime) -> str:
    own = _load(certificate, "certificate", x509.load_pem_x509_certificate)
    private = _load(key, "unencrypted private key", lambda pem: serialization.load_pem_private_key(pem, None))
    if private.public_key() != own.public_key():
        raise BrokerFilesError(
            f"The key {key} does not belong to the certificate {certificate}: put the right one there."
        )
    authority = _load(ca, "certificate", x509.load_pem_x509_certificate)
    revoked = _load(crl, "revocation list", x509.load_pem_x509_crl)
    try:
        own.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise BrokerFilesError(f"{certificate} was not signed by {ca}: clients with that file refuse it.") from error
    signer = authority.public_key()
    if not isinstance(signer, ec.EllipticCurvePublicKey):
        raise BrokerFilesError(f"{ca} has no elliptic-curve key: the listener's ciphers need one.")
    if not revoked.is_signature_valid(signer):
        raise BrokerFilesError(f"{crl} was not signed by {ca}: the broker would refuse every client.")
    begins = {ca: authority.not_valid_before_utc, certificate: own.not_valid_before_utc}
    ends = {ca: authority.not_valid_after_utc, certificate: own.not_valid_after_utc}
    return _lifetimes(begins, ends | {crl: revoked.next_update_utc or now + SOON}, now)


def _lifetimes(begins: dict[Path, datetime], ends: dict[Path, datetime], now: datetime) -> str:
    for path, begin in begins.items():
        if now < begin:
            raise BrokerFilesError(f"{path} is valid from {begin:%Y-%m-%d %H:%M} on: set the clock, or renew it.")
    for path, end in ends.items():
        if end <= now:
            raise BrokerFilesError(f"{path} ran out on {end:%Y-%m-%d}: renew it, or the broker refuses all clients.")
    path, end = min(ends.items(), key=lambda item: item[1])
    return f"They go together; the first to end is {path}, on {end:%Y-%m-%d}."


def check_directory(directory: Path, on_check: Callable[[Check], None] = lambda _check: None) -> list[Check]:
    """Check a folder of rendered files; raise BrokerError if that is not possible."""
    broker = read_description(directory / DESCRIPTION_FILE, production=False)
    checks = Checklist(on_check)
    checks.run("modes", lambda: _modes(directory), needs=())
    if (tls := broker.tls) is not None:
        checks.run("certificates", lambda: check_certificates(tls, directory, now=datetime.now(UTC)), needs=())
    return checks.done


def _modes(directory: Path) -> str:
    paths = [directory / CONF_FILE, directory / ACCESS_FILE]
    loose = [str(path) for path in paths if path.stat().st_mode & 0o007]
    if loose:
        raise BrokerFilesError(f"Other users may read {', '.join(loose)}: restrict it (chmod o-rwx).")
    return "No file is accessible to other users."
