"""Certificate of ours: whose it is, and until when it is valid."""

from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID


def certificate_end(path: Path | None) -> datetime | None:
    """Return until when a certificate (PEM) is valid, with its time zone; None if there is none that can be read."""
    if path is None:
        return None
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return None


def certificate_name(path: Path | None) -> str | None:
    """Return the common name in a certificate (PEM), our client id at the broker; None if none can be read."""
    if path is None:
        return None
    try:
        names = x509.load_pem_x509_certificate(path.read_bytes()).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (OSError, ValueError):
        return None
    return str(names[0].value) if names else None
