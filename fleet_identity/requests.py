"""Signing requests: how a public key travels to the authority while the private one stays where it was made."""

from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fleet_identity.errors import RequestRefused
from fleet_identity.files import read_bounded
from schemas.names import check_name

__all__ = ["check_request", "load_request", "make_request", "requested_name"]


def make_request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """Return a request for `name` in PEM, signed with the key that it is for."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(name))])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def load_request(path: Path) -> x509.CertificateSigningRequest:
    """Read a request; it is not checked yet.

    Raises:
        IdentityError: The file cannot be read.
        RequestRefused: It holds no request.
    """
    content = read_bounded(path, "The signing request")
    try:
        return x509.load_pem_x509_csr(content)
    except ValueError as error:
        raise RequestRefused(
            f"{path} is no signing request in PEM: make one on the device with `fleet device enroll`."
        ) from error


def requested_name(request: x509.CertificateSigningRequest) -> str:
    """Return the name that the request asks for; not checked in any way.

    Raises:
        RequestRefused: It asks for none, or several.
    """
    try:
        names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        (name,) = names
    except ValueError as error:
        raise RequestRefused("The signing request does not ask for exactly one common name.") from error
    return str(name.value)


def check_request(request: x509.CertificateSigningRequest, *, name: str) -> ec.EllipticCurvePublicKey:
    """Return the public key to certify. Nothing else of the request is ever used: not one of its extensions.

    Args:
        request: From a device; hostile until checked.
        name: What the operator signs for.

    Raises:
        RequestRefused: It asks for another name, its key is of another kind, or it was not signed with that key.
    """
    asked = requested_name(request)
    if asked != name:
        raise RequestRefused(
            f"The signing request asks for {asked[:80]!r} and not for {name!r}: sign it for no other name."
        )
    try:
        key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise RequestRefused(
            "The signing request has a key or a signature of an unknown kind: use EC P-256."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RequestRefused("The signing request has a key of another kind: only EC P-256 is signed.")
    if not signed:
        raise RequestRefused(
            "The signing request was not signed with the key that it asks for: it was changed on its way."
        )
    return key
