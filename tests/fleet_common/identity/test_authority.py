import multiprocessing
import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleet_common.identity import authority as module
from fleet_common.identity.authority import Authority, create_authority
from fleet_common.identity.certificates import AccessAction, IdentityRole, key_pem, make_request, new_key, same_key
from fleet_common.identity.files import AuthorityError, IdentityError, NameRefused, SigningRefused
from fleet_common.identity.index import CertificateIndex, CertificateRecord
from schemas.errors import InvalidName
from tests.fleet_common.identity.conftest import FrozenClock, request_for
from tests.support.waiting import PATIENCE_S

DEVICE, EDGE, MONITOR, BROKER = IdentityRole.DEVICE, IdentityRole.EDGE, IdentityRole.MONITOR, IdentityRole.BROKER


def sign(
    authority: Authority, name: str, role: IdentityRole = DEVICE, hosts: tuple[str, ...] = ()
) -> CertificateRecord:
    return authority.sign(request_for(name), name=name, role=role, hosts=hosts)


def parsed(entry: CertificateRecord) -> x509.Certificate:
    return x509.load_pem_x509_certificate(entry.pem.encode())


def listed(authority: Authority) -> set[str]:
    found = x509.load_pem_x509_crl(authority.folder.revocation_list.read_bytes())
    assert isinstance(authority.certificate.public_key(), ec.EllipticCurvePublicKey)
    assert found.is_signature_valid(authority.certificate.public_key())  # type: ignore[arg-type]
    return {f"{line.serial_number:x}" for line in found}


def records(authority: Authority) -> list[CertificateRecord]:
    with CertificateIndex(authority.folder.index) as index:
        return [*index.refused(ending_after=datetime.min.replace(tzinfo=UTC)), *index.identities()]


def test_a_certificate_says_what_it_is_for_and_nothing_more(authority: Authority, clock: FrozenClock) -> None:
    signed = parsed(sign(authority, "sensor-1"))
    assert signed.subject.rfc4514_string() == "CN=sensor-1,OU=device,O=home"
    signed.verify_directly_issued_by(authority.certificate)
    assert signed.not_valid_after_utc == clock.now + timedelta(days=90)
    assert signed.not_valid_before_utc == clock.now - timedelta(hours=1), "a clock may be a little behind"
    extensions = signed.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    purposes = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert purposes == [ExtendedKeyUsageOID.CLIENT_AUTH], "a device must not be able to play the broker"
    assert not [each for each in extensions if isinstance(each.value, x509.SubjectAlternativeName)]


def test_the_authority_may_sign_identities_but_no_other_authority(authority: Authority) -> None:
    constraints = authority.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    usage = authority.certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)


def test_a_broker_has_its_hosts_and_is_a_server_alone(authority: Authority) -> None:
    signed = parsed(sign(authority, "broker", BROKER, ("mqtt.example.org", "10.0.0.7", "::1")))
    names = signed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["mqtt.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "::1"]
    purposes = list(signed.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert purposes == [ExtendedKeyUsageOID.SERVER_AUTH]


@pytest.mark.parametrize("host", ["*.example.org", "host:8883", "a b", "", "-a.org", "x" * 254, "mqtt://host"])
def test_what_is_no_host_is_refused(authority: Authority, host: str) -> None:
    with pytest.raises(NameRefused):
        sign(authority, "broker", BROKER, (host,))
    with pytest.raises(NameRefused):
        sign(authority, "broker", BROKER)


def test_nothing_of_a_request_but_its_key_is_taken_over(authority: Authority) -> None:
    key = new_key()
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(
            x509.Name(
                [
                    x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "edge"),
                    x509.NameAttribute(NameOID.COMMON_NAME, "sensor-1"),
                ]
            )
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=5), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("broker")]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    signed = parsed(authority.sign(greedy, name="sensor-1", role=DEVICE))
    honest = parsed(sign(authority, "sensor-2"))
    assert signed.subject.rfc4514_string() == "CN=sensor-1,OU=device,O=home"
    assert {each.oid for each in signed.extensions} == {each.oid for each in honest.extensions}
    assert not signed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert same_key(signed.public_key(), key.public_key())


def test_a_name_keeps_its_role_for_ever(authority: Authority) -> None:
    sign(authority, "south", EDGE)
    authority.revoke(["south"])
    with pytest.raises(NameRefused, match="role edge"):
        sign(authority, "south")


def test_names_that_differ_in_case_alone_are_not_given_to_two(authority: Authority) -> None:
    sign(authority, "sensor-1")
    with pytest.raises(NameRefused, match="'sensor-1'"):
        sign(authority, "Sensor-1")


def test_a_name_is_not_given_to_two_devices(authority: Authority, clock: FrozenClock) -> None:
    sign(authority, "sensor-1")
    with pytest.raises(NameRefused, match="2030-04-01"):
        sign(authority, "sensor-1")
    clock.forward(days=91)
    sign(authority, "sensor-1")


def test_a_key_is_not_given_two_names(authority: Authority) -> None:
    key = new_key()
    for name in ("sensor-1", "sensor-2"):
        request = x509.load_pem_x509_csr(make_request(key, name))
        if name == "sensor-1":
            authority.sign(request, name=name, role=DEVICE)
            continue
        with pytest.raises(SigningRefused, match="'sensor-1'"):
            authority.sign(request, name=name, role=DEVICE)


def test_a_certificate_is_renewed_in_its_last_thirty_days(authority: Authority, clock: FrozenClock) -> None:
    first = sign(authority, "sensor-1")
    clock.forward(days=59)
    with pytest.raises(NameRefused, match="2030-04-01"):
        authority.renew("sensor-1")
    assert authority.due() == ()
    clock.forward(days=1)
    assert authority.due() == ("sensor-1",)
    second = authority.renew("sensor-1")
    assert second.key_sha256 == first.key_sha256, "so that only the certificate has to travel"
    assert second.not_after == clock.now + timedelta(days=90)
    assert authority.due() == ()
    assert first.serial not in listed(authority), "the old one is good to its end"


def test_a_renewal_may_bring_a_new_key(authority: Authority) -> None:
    first = sign(authority, "sensor-1")
    second = authority.renew("sensor-1", request=request_for("sensor-1"), early=True)
    assert second.key_sha256 != first.key_sha256
    with pytest.raises(SigningRefused, match="'sensor-1'"):
        authority.renew("sensor-1", request=request_for("sensor-2"), early=True)


def test_who_was_revoked_is_not_renewed_and_its_key_never_signed_again(authority: Authority) -> None:
    key = new_key()
    request = x509.load_pem_x509_csr(make_request(key, "sensor-1"))
    authority.sign(request, name="sensor-1", role=DEVICE)
    authority.revoke(["sensor-1"])
    with pytest.raises(NameRefused, match="'sensor-1'"):
        authority.renew("sensor-1", early=True)
    with pytest.raises(SigningRefused, match="'sensor-1'"):
        authority.sign(request, name="sensor-1", role=DEVICE)
    sign(authority, "sensor-1")


def test_a_name_is_revoked_with_all_its_certificates(authority: Authority) -> None:
    serials = {sign(authority, "sensor-1").serial, authority.renew("sensor-1", early=True).serial}
    kept = sign(authority, "sensor-2")
    revocation = authority.revoke(["sensor-1"])
    assert set(revocation.serials) == serials
    assert serials < listed(authority)
    assert kept.serial not in listed(authority)


def test_the_canary_is_issued_revoked_and_the_kicker_is_not(authority: Authority, clock: FrozenClock) -> None:
    sign(authority, "sensor-1")
    revocation = authority.revoke(["sensor-1"])
    kicker = revocation.kickers["sensor-1"]
    assert revocation.canary is not None
    serials = [
        f"{x509.load_pem_x509_certificate(each.certificate).serial_number:x}" for each in (revocation.canary, kicker)
    ]
    assert [serial in listed(authority) for serial in serials] == [True, False]
    end = x509.load_pem_x509_certificate(kicker.certificate).not_valid_after_utc
    assert end - clock.now <= timedelta(hours=1)
    assert authority.entries()[-1].name == "sensor-1"
    assert len(authority.entries()) == 1, "they are nobody's identities"


def held(authority: Authority) -> set[str]:
    found = x509.load_pem_x509_crl(authority.folder.revocation_list.read_bytes())
    return {f"{line.serial_number:x}" for line in found if list(line.extensions)}


def test_a_suspended_name_is_on_the_list_until_that_is_lifted(authority: Authority) -> None:
    serials = {sign(authority, "sensor-1").serial, authority.renew("sensor-1", early=True).serial}
    assert authority.change_access(AccessAction.SUSPEND, ["sensor-1"]).kickers.keys() == {"sensor-1"}
    assert serials <= listed(authority)
    assert held(authority) == serials, "only these may be lifted again"
    assert {each.suspended_by for each in authority.entries()} == {"tester"}
    assert not authority.change_access(AccessAction.UNSUSPEND, ["sensor-1"]).kickers
    assert not serials & listed(authority)
    authority.renew("sensor-1", early=True)


def test_a_suspended_name_gets_no_certificate_that_is_not_on_the_list(authority: Authority, clock: FrozenClock) -> None:
    sign(authority, "sensor-1")
    authority.change_access(AccessAction.SUSPEND, ["sensor-1"])
    with pytest.raises(NameRefused):
        authority.renew("sensor-1", early=True)
    clock.forward(days=91)
    assert authority.due() == (), "the renewal of others goes on"
    with pytest.raises(NameRefused):
        sign(authority, "sensor-1")


def test_a_revocation_outlives_a_suspension(authority: Authority) -> None:
    serial = sign(authority, "sensor-1").serial
    authority.change_access(AccessAction.SUSPEND, ["sensor-1"])
    authority.revoke(["sensor-1"])
    assert serial in listed(authority) - held(authority)
    for action in (AccessAction.SUSPEND, AccessAction.UNSUSPEND):
        with pytest.raises(NameRefused):
            authority.change_access(action, ["sensor-1"])


def test_who_is_disconnected_is_on_no_list(authority: Authority) -> None:
    sign(authority, "sensor-1")
    before = authority.folder.revocation_list.read_bytes()
    change = authority.change_access(AccessAction.DISCONNECT, ["sensor-1"])
    assert (change.revocation_list, change.canary, list(change.kickers)) == (None, None, ["sensor-1"])
    assert authority.folder.revocation_list.read_bytes() == before
    sign(authority, "mosquitto", BROKER, ("localhost",))
    with pytest.raises(NameRefused):
        authority.change_access(AccessAction.DISCONNECT, ["mosquitto"])


def test_an_unknown_name_among_others_revokes_nobody(authority: Authority) -> None:
    sign(authority, "sensor-1")
    with pytest.raises(NameRefused, match="sensor-9"):
        authority.revoke(["sensor-1", "sensor-9"])
    assert listed(authority) == set()
    with pytest.raises(NameRefused):
        authority.revoke([])


def test_the_list_forgets_what_has_long_ended(authority: Authority, clock: FrozenClock) -> None:
    old = sign(authority, "sensor-1")
    authority.revoke(["sensor-1"])
    clock.forward(days=90, hours=12)
    authority.revoke(["sensor-1"])
    assert old.serial in listed(authority), "a broker's clock may be behind"
    clock.forward(days=1)
    authority.revoke(["sensor-1"])
    assert old.serial not in listed(authority)


def test_lists_follow_each_other_and_outlive_no_authority(authority: Authority, clock: FrozenClock) -> None:
    sign(authority, "sensor-1")
    times, numbers = [], []
    for _ in range(3):
        authority.revoke(["sensor-1"])
        found = x509.load_pem_x509_crl(authority.folder.revocation_list.read_bytes())
        times.append(found.last_update_utc)
        numbers.append(found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number)
        assert found.next_update_utc == authority.certificate.not_valid_after_utc
    assert times == sorted(set(times))
    assert max(times) < clock.now, "a broker takes no list from its future"
    assert numbers == [2, 3, 4]


def test_a_record_says_who_made_and_who_revoked_a_certificate(authority: Authority) -> None:
    entry = sign(authority, "sensor-1")
    renewed = authority.renew("sensor-1", early=True)
    other = sign(authority, "sensor-2")
    replace(authority, actor="eve").revoke(["sensor-1"])
    found = {each.serial: (each.action, each.by, each.revoked_by) for each in records(authority)}
    assert found[entry.serial] == ("sign", "tester", "eve")
    assert found[renewed.serial] == ("renew", "tester", "eve")
    assert found[other.serial] == ("sign", "tester", "")
    assert [each for each in found.values() if each[0] == "take over"] == [("take over", "eve", "eve")]


def test_a_change_of_the_index_is_whole_or_not_at_all(authority: Authority) -> None:
    with CertificateIndex(authority.folder.index) as index:

        def fail_midway() -> None:
            with index.change():
                index.keep_name("sensor-1", DEVICE)
                raise KeyError

        with pytest.raises(KeyError):
            fail_midway()
        assert index.owner("sensor-1") is None


def test_secrets_are_the_owners_alone(authority: Authority) -> None:
    for path in (authority.folder.key, authority.folder.index):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(authority.folder.path.stat().st_mode) == 0o700


def test_there_is_one_authority_in_a_folder(authority: Authority) -> None:
    before = authority.folder.key.read_bytes()
    with pytest.raises(AuthorityError):
        create_authority(authority.folder.path, fleet="home", actor="tester", clock=authority.clock)
    assert authority.folder.key.read_bytes() == before


@pytest.mark.parametrize("kept", [("a/b", EDGE), ("monitor-1", EDGE)])
def test_a_kept_name_is_checked_before_anything_is_made(tmp_path: Path, kept: tuple[str, IdentityRole]) -> None:
    with pytest.raises((InvalidName, NameRefused)):
        create_authority(tmp_path / "ca", fleet="home", actor="tester", kept=[kept])
    assert not (tmp_path / "ca").exists()


def damaged(authority: Authority, what: str) -> None:
    folder = authority.folder
    match what:
        case "no key":
            folder.key.unlink()
        case "open key":
            folder.key.chmod(0o644)
        case "other key":
            folder.key.write_bytes(key_pem(new_key()))
        case "no index":
            folder.index.unlink()
        case "bad index":
            folder.index.write_bytes(b"nonsense" * 1000)


@pytest.mark.parametrize("what", ["no key", "open key", "other key", "no index", "bad index"])
def test_a_damaged_authority_signs_nothing(authority: Authority, what: str) -> None:
    damaged(authority, what)
    with pytest.raises(AuthorityError) as caught:
        sign(authority, "sensor-1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("days", [-2, 3651])
def test_a_wrong_clock_is_noticed_before_signing(authority: Authority, clock: FrozenClock, days: int) -> None:
    clock.forward(days=days)
    with pytest.raises(AuthorityError):
        Authority.open(authority.folder.path, actor="tester", clock=clock)


def test_an_encrypted_key_needs_its_passphrase(tmp_path: Path) -> None:
    create_authority(tmp_path / "ca", fleet="home", actor="tester", passphrase=b"open sesame")
    assert b"ENCRYPTED" in (tmp_path / "ca" / "ca.key").read_bytes()
    sign(Authority.open(tmp_path / "ca", actor="tester", passphrase=lambda: b"open sesame"), "sensor-1")
    for wrong in (b"guess", None):
        with pytest.raises(IdentityError):
            sign(Authority.open(tmp_path / "ca", actor="tester", passphrase=lambda: wrong), "sensor-2")  # noqa: B023


def _sign_many(folder: Path, worker: int) -> None:
    authority = Authority.open(folder, actor=f"worker-{worker}")
    for number in range(4):
        sign(authority, f"sensor-{worker}-{number}")
        authority.revoke([f"sensor-{worker}-{number}"])


def test_a_second_command_gives_up_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_S", 0.0)
    authority = create_authority(tmp_path / "ca", fleet="home", actor="tester")
    with authority.folder.locked(), pytest.raises(AuthorityError):
        sign(authority, "device-1")
    sign(authority, "device-1")


@pytest.mark.slow
def test_commands_at_once_come_one_after_the_other(tmp_path: Path) -> None:
    create_authority(tmp_path / "ca", fleet="home", actor="tester")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_sign_many, args=(tmp_path / "ca", number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE_S)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    authority = Authority.open(tmp_path / "ca", actor="tester")
    assert len(authority.entries()) == 12
    assert {entry.serial for entry in authority.entries()} < listed(authority)
    assert len(authority.entries()) == 12
    found = x509.load_pem_x509_crl(authority.folder.revocation_list.read_bytes())
    assert found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 13
