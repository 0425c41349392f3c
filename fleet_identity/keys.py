"""Private keys: EC P-256, the curve that every TLS library and most secure elements have."""

import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet_identity.errors import CertificateRefused
from fleet_identity.files import SECRET, read_bounded, write_atomically

__all__ = ["Passphrase", "fingerprint", "is_encrypted", "key_pem", "load_key", "new_key", "same_key", "save_key"]

Passphrase = bytes | None

_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a fresh key from the system's randomness."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey, passphrase: Passphrase = None) -> bytes:
    """Return the key as PKCS #8 in PEM, encrypted if there is a passphrase."""
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        how = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def save_key(path: Path, key: ec.EllipticCurvePrivateKey, passphrase: Passphrase = None) -> None:
    """Write the key, for its owner alone.

    Raises:
        IdentityError: It cannot be written.
    """
    write_atomically(path, key_pem(key, passphrase), mode=SECRET)


def is_encrypted(path: Path) -> bool:
    """Whether the key needs a passphrase.

    Raises:
        IdentityError: It cannot be read.
    """
    return _ENCRYPTED in read_bounded(path, "The private key")


def load_key(path: Path, passphrase: Passphrase = None) -> ec.EllipticCurvePrivateKey:
    """Read a key.

    Raises:
        IdentityError: It cannot be read.
        CertificateRefused: It is no key, not of our kind, or the passphrase is wrong or missing.
    """
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
    """Return the SHA-256 of a public key, in hexadecimal.

    Raises:
        CertificateRefused: It is not of our kind.
    """
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CertificateRefused("The key is of another kind: only EC P-256 is used.")
    encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).hexdigest()


def same_key(one: object, other: object) -> bool:
    """Whether two public keys are the same."""
    return fingerprint(one) == fingerprint(other)
