import stat
from pathlib import Path

import pytest
from cryptography import x509

from fleet_common.identity.authority import Authority, create_authority
from fleet_common.identity.certificates import IdentityRole, load_key, load_request, same_key
from fleet_common.identity.enrolment import Enrolment
from fleet_common.identity.files import CertificateRefused, IdentityError, NameRefused
from tests.fleet_common.identity.conftest import FrozenClock, request_for

NAME = "sensor-1"


@pytest.fixture
def enrolment(tmp_path: Path, clock: FrozenClock) -> Enrolment:
    return Enrolment(tmp_path / "credentials", NAME, clock)


def answer(authority: Authority, request: Path, to: Path, name: str = NAME) -> Path:
    entry = authority.sign(load_request(request), name=name, role=IdentityRole.DEVICE)
    to.write_text(entry.pem)
    return to


def test_a_device_is_enrolled_in_two_steps(enrolment: Enrolment, authority: Authority, tmp_path: Path) -> None:
    signed = answer(authority, enrolment.ask(), tmp_path / "signed.pem")
    taken = enrolment.install(signed, authority.folder.certificate)
    assert same_key(taken.public_key(), load_key(enrolment.key).public_key())
    assert enrolment.certificate.read_text() == signed.read_text()
    assert stat.S_IMODE(enrolment.key.stat().st_mode) == 0o600
    assert stat.S_IMODE(enrolment.folder.stat().st_mode) == 0o700


def test_a_renewal_needs_the_certificate_alone(enrolment: Enrolment, authority: Authority, tmp_path: Path) -> None:
    enrolment.install(answer(authority, enrolment.ask(), tmp_path / "signed.pem"), authority.folder.certificate)
    (tmp_path / "renewed.pem").write_text(authority.renew(NAME, early=True).pem)
    enrolment.install(tmp_path / "renewed.pem")
    assert enrolment.certificate.read_text() == (tmp_path / "renewed.pem").read_text()


def test_a_new_key_waits_for_its_certificate(enrolment: Enrolment, authority: Authority, tmp_path: Path) -> None:
    enrolment.install(answer(authority, enrolment.ask(), tmp_path / "signed.pem"), authority.folder.certificate)
    old = enrolment.key.read_bytes()
    request = enrolment.ask(fresh=True)
    assert enrolment.key.read_bytes() == old, "it is still needed"
    (tmp_path / "renewed.pem").write_text(authority.renew(NAME, request=load_request(request), early=True).pem)
    enrolment.install(tmp_path / "renewed.pem")
    assert enrolment.key.read_bytes() != old
    assert not enrolment.next_key.exists()
    shown = x509.load_pem_x509_certificate(enrolment.certificate.read_bytes())
    assert same_key(load_key(enrolment.key).public_key(), shown.public_key())


def test_a_certificate_for_another_key_is_refused(enrolment: Enrolment, authority: Authority, tmp_path: Path) -> None:
    enrolment.ask()
    other = authority.sign(request_for(NAME), name=NAME, role=IdentityRole.DEVICE)
    (tmp_path / "signed.pem").write_text(other.pem)
    with pytest.raises(CertificateRefused):
        enrolment.install(tmp_path / "signed.pem", authority.folder.certificate)
    assert not enrolment.certificate.exists()


def test_a_certificate_for_another_name_is_refused(authority: Authority, tmp_path: Path, clock: FrozenClock) -> None:
    other = Enrolment(tmp_path / "credentials", "sensor-2", clock)
    signed = answer(authority, other.ask(), tmp_path / "signed.pem", "sensor-2")
    with pytest.raises(CertificateRefused, match="sensor-2"):
        Enrolment(tmp_path / "credentials", NAME, clock).install(signed, authority.folder.certificate)


def test_a_certificate_of_another_authority_is_refused(
    enrolment: Enrolment, authority: Authority, tmp_path: Path, clock: FrozenClock
) -> None:
    signed = answer(authority, enrolment.ask(), tmp_path / "signed.pem")
    other = create_authority(tmp_path / "other", fleet="home", actor="tester", clock=clock)
    with pytest.raises(CertificateRefused):
        enrolment.install(signed, other.folder.certificate)


def test_whom_a_device_trusts_does_not_change_by_itself(
    enrolment: Enrolment, authority: Authority, tmp_path: Path, clock: FrozenClock
) -> None:
    enrolment.install(answer(authority, enrolment.ask(), tmp_path / "signed.pem"), authority.folder.certificate)
    other = create_authority(tmp_path / "other", fleet="home", actor="tester", clock=clock)
    impostor = answer(other, enrolment.request, tmp_path / "impostor.pem")
    with pytest.raises(CertificateRefused):
        enrolment.install(impostor, other.folder.certificate)
    assert enrolment.ca.read_bytes() == authority.folder.certificate.read_bytes()


@pytest.mark.parametrize("hours", [-2, 90 * 24])
def test_outside_its_time_a_certificate_is_refused(
    enrolment: Enrolment, authority: Authority, tmp_path: Path, clock: FrozenClock, hours: int
) -> None:
    signed = answer(authority, enrolment.ask(), tmp_path / "signed.pem")
    clock.forward(hours=hours)
    with pytest.raises(CertificateRefused):
        enrolment.install(signed, authority.folder.certificate)


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_certificate(enrolment: Enrolment, authority: Authority, tmp_path: Path, content: bytes) -> None:
    enrolment.ask()
    (tmp_path / "signed.pem").write_bytes(content)
    with pytest.raises(IdentityError):
        enrolment.install(tmp_path / "signed.pem", authority.folder.certificate)


def test_a_device_does_not_ask_for_an_edges_name(tmp_path: Path, clock: FrozenClock) -> None:
    with pytest.raises(NameRefused):
        Enrolment(tmp_path / "credentials", "edge-1", clock).ask()
    assert not (tmp_path / "credentials").exists()
