from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from fleet_common.identity.certificates import check_request, make_request, new_key
from fleet_common.identity.files import SigningRefused


def named(*names: str) -> x509.CertificateSigningRequestBuilder:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names]
    return x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))


def test_a_request_is_signed_for_no_other_name() -> None:
    request = x509.load_pem_x509_csr(make_request(new_key(), "sensor-2"))
    with pytest.raises(SigningRefused, match="sensor-2"):
        check_request(request, name="sensor-1")


@pytest.mark.parametrize("names", [(), ("sensor-1", "edge-1"), ("edge-1", "sensor-1")])
def test_a_request_asks_for_one_name(names: tuple[str, ...]) -> None:
    with pytest.raises(SigningRefused):
        check_request(named(*names).sign(new_key(), hashes.SHA256()), name="sensor-1")


@pytest.mark.parametrize(
    "make",
    [
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate,
    ],
    ids=["P-384", "RSA", "Ed25519"],
)
def test_only_p256_is_signed(make: Callable[[], Any]) -> None:
    key = make()
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    with pytest.raises(SigningRefused):
        check_request(named("sensor-1").sign(key, algorithm), name="sensor-1")


def test_a_request_whose_key_was_exchanged_on_its_way_is_refused() -> None:
    honest = named("sensor-1").sign(new_key(), hashes.SHA256())
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    mine = honest.public_key().public_bytes(encoding, form)
    theirs = new_key().public_key().public_bytes(encoding, form)
    forged = x509.load_der_x509_csr(honest.public_bytes(encoding).replace(mine, theirs))
    with pytest.raises(SigningRefused):
        check_request(forged, name="sensor-1")
