"""TLS context of a link: what is loaded from the files, and what is demanded of the broker."""

import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509

from fleet_common.mqtt.errors import ConnectFailed, LinkFault
from fleet_common.mqtt.failures import reason_of
from fleet_common.mqtt.settings import TlsSettings

# For TLS 1.2: ephemeral keys and authenticated encryption only. TLS 1.3 has nothing else.
CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20:!aNULL:!eNULL"


class LinkContext(ssl.SSLContext):
    """A context that remembers why the broker hung up.

    A broker that refuses our certificate says so in an alert, which under TLS 1.3 arrives after the handshake, in the
    middle of the MQTT library's reading, where it would be lost.
    """

    alert: ssl.SSLError | None = None


def tls_context(tls: TlsSettings, *, now: datetime | None = None) -> LinkContext:
    """Load the files and return the context for connections.

    Args:
        tls: The files.
        now: The time, with its time zone; the system's if left out.

    Raises:
        ConnectFailed: A file cannot be read, is not what it should be, does not fit another, or is not valid now.
    """
    context = LinkContext(ssl.PROTOCOL_TLS_CLIENT)  # asks for the broker's certificate and checks its host name
    context.options |= ssl.OP_NO_RENEGOTIATION  # of TLS 1.2: reading never has to wait for writing, nor the reverse
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False  # a name counts only where the authority has put it as a host's
    context.set_ciphers(CIPHERS)
    _load_authority(context, tls.ca)
    if tls.certificate is not None:
        key = tls.key if tls.key is not None else tls.certificate
        _check_certificate(tls.certificate, now if now is not None else datetime.now(UTC))
        _load_pair(context, tls.certificate, key)
    return context


def _load_authority(context: ssl.SSLContext, path: Path) -> None:
    _read(path)
    try:
        context.load_verify_locations(str(path))
    except (OSError, ValueError) as error:
        raise _unusable(path, "it holds no certificate in PEM; take the fleet authority's ca.pem") from error


def _check_certificate(path: Path, now: datetime) -> None:
    try:
        found = x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise _unusable(path, "it holds no certificate in PEM; take the one that the authority signed") from error
    begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
    clock = f"this machine's clock says {now:%Y-%m-%d %H:%M} (UTC)"
    if now < begins:
        raise _unusable(path, f"it is valid from {begins:%Y-%m-%d %H:%M} and {clock}; set the clock")
    if now >= ends:
        raise _unusable(path, f"it ended at {ends:%Y-%m-%d %H:%M} and {clock}; have it renewed, or set the clock")


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    _read(key)
    try:
        context.load_cert_chain(str(certificate), str(key), password=_nobody_to_ask)
    except _Encrypted as error:
        raise _unusable(key, "it has a passphrase, and nobody is here to ask; store it without one") from error
    except (OSError, ValueError) as error:
        mismatch = "KEY_VALUES_MISMATCH" in str(error) or "KEY_TYPE_MISMATCH" in str(error)
        why = f"it does not belong to the certificate {certificate}" if mismatch else "it holds no private key in PEM"
        raise _unusable(key, f"{why}; take the two that were made together") from error


class _Encrypted(Exception):  # noqa: N818 - reads as what it says
    """The key has a passphrase."""


def _nobody_to_ask() -> str:
    # Without this the library would ask on the terminal, and a service would wait there for ever.
    raise _Encrypted


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unusable(path, f"{reason_of(error)}; check the path and who may read it") from error


def _unusable(path: Path, why: str) -> ConnectFailed:
    return ConnectFailed(f"The TLS files cannot be used: {path}: {why}.", fault=LinkFault.CERTIFICATE, final=True)
