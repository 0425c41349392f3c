from pathlib import Path
from typing import Any

import pytest

from fleet_edge import SessionLog
from fleet_edge.session_log.database import open_store
from tests.support.command import Run, as_json, refused


@pytest.fixture
def run(fleet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLEET_CA_PASSPHRASE", raising=False)
    return lambda *words: fleet("device" if words[0] == "enroll" else "broker", *words)


def data(run: Run, *arguments: str) -> Any:
    return as_json(run(*arguments, "--json"))


@pytest.fixture
def ca(run: Run) -> None:
    assert run("ca", "--fleet", "home", "--edge", "north")[0] == 0


@pytest.mark.usefixtures("ca")
def test_a_device_comes_from_nothing_to_its_settings(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("enroll", "sensor-1", "--folder", "dev")
    assert code == 0
    assert "fleet broker sign sensor-1 device.csr" in out
    assert run("sign", "sensor-1", "dev/device.csr")[0] == 0
    code, out, _ = run(
        "enroll", "sensor-1", "--folder", "dev", "--certificate", "ca/issued/sensor-1.pem", "--ca", "ca/ca.pem"
    )
    assert code == 0
    assert f'key = "{tmp_path}/dev/device.key"' in out
    fingerprint = out.split()[-1]
    assert len(fingerprint) == 64
    assert (
        fingerprint
        == data(run, "enroll", "sensor-1", "--folder", "dev", "--certificate", "dev/device.pem")["ca_sha256"]
    )


@pytest.mark.usefixtures("ca")
def test_a_probes_files_serve_the_selftest_only(run: Run, fleet: Run, tmp_path: Path) -> None:
    def edge(*arguments: str) -> str:
        return fleet("edge", "enroll", "probe-north", "--folder", "probe", *arguments)[1]

    assert "fleet edge enroll probe-north --folder probe --certificate" in edge()
    assert run("sign", "probe-north", "probe/device.csr")[0] == 0
    out = edge("--certificate", "ca/issued/probe-north.pem", "--ca", "ca/ca.pem")
    assert "[broker]" not in out
    files = f"--certificate {tmp_path}/probe/device.pem --key {tmp_path}/probe/device.key"
    assert f"fleet edge selftest --config edge.toml {files}" in out


def test_json_has_what_a_program_needs(run: Run) -> None:
    made = data(run, "ca", "--fleet", "home")
    assert made["fleet"] == "home"
    issued = data(run, "issue", "edge-1", "--role", "edge")
    assert (issued["name"], issued["role"]) == ("edge-1", "edge")
    assert Path(issued["key"]).stat().st_mode & 0o777 == 0o600
    broker = data(run, "issue", "broker", "--role", "broker", "--host", "localhost", "--host", "127.0.0.1")
    assert broker["hosts"] == ["localhost", "127.0.0.1"]
    request = data(run, "enroll", "sensor-1")["request"]
    (signed,) = data(run, "sign", "sensor-1", request)
    (renewed,) = data(run, "renew", "sensor-1", "--early")
    assert renewed["serial"] != signed["serial"]
    assert data(run, "renew", "--due") == []
    revoked = data(run, "revoke", "sensor-1")
    assert revoked["serials"] == [signed["serial"], renewed["serial"]]
    assert revoked["in_force"] is False
    lines = {line["name"]: (line["state"], line["days_left"]) for line in data(run, "list")}
    assert lines == {"broker": ("valid", 89), "edge-1": ("valid", 89), "sensor-1": ("revoked", 89)}
    assert len(data(run, "list", "--all")) == 4


@pytest.mark.usefixtures("ca")
def test_an_identity_is_listed_and_when_it_is_revoked_without_a_broker_its_sessions_go_on(run: Run) -> None:
    run("issue", "edge-1", "--role", "edge")
    _, out, _ = run("list")
    assert "edge-1" in out
    assert "left" in out
    code, out, _ = run("revoke", "edge-1")
    assert code == 0
    assert "repeat the command with --host" in out


@pytest.mark.usefixtures("ca")
def test_a_suspension_is_listed_until_it_is_lifted(run: Run) -> None:
    run("issue", "edge-1", "--role", "edge")

    def state() -> str:
        return str(next(line["state"] for line in data(run, "list") if line["name"] == "edge-1"))

    assert data(run, "suspend", "edge-1")["in_force"] is False
    assert state() == "suspended"
    assert "fleet broker unsuspend edge-1" in refused(run("renew", "edge-1", "--early"))
    assert "unsuspended" in run("unsuspend", "edge-1")[1]
    assert state() == "valid"
    assert "not suspended" in refused(run("unsuspend", "edge-1"))
    for command in (("enforce",), ("disconnect", "edge-1")):
        assert "--host" in refused(run(*command)), "without a broker it would be no more than a wish"


@pytest.mark.usefixtures("ca")
def test_how_the_broker_is_reached_is_remembered(run: Run, tmp_path: Path) -> None:
    run("issue", "edge-1", "--role", "edge")
    run("revoke", "edge-1", "--crl", "installed.pem")
    (tmp_path / "installed.pem").unlink()
    run("revoke", "edge-1")
    assert (tmp_path / "installed.pem").read_bytes() == (tmp_path / "ca" / "crl.pem").read_bytes()


@pytest.mark.usefixtures("ca")
def test_a_revocation_that_does_not_reach_the_broker_is_recorded_and_its_options_are_not(
    run: Run, tmp_path: Path
) -> None:
    run("issue", "edge-1", "--role", "edge")
    known = (tmp_path / "ca" / "broker.json").read_bytes()
    complaint = refused(run("revoke", "edge-1", "--pid-file", "absent.pid"))
    assert "recorded" in complaint
    assert "not yet in force" in complaint
    assert "absent.pid" in complaint
    assert (tmp_path / "ca" / "broker.json").read_bytes() == known
    assert [line["state"] for line in data(run, "list") if line["name"] == "edge-1"] == ["revoked"]
    assert run("revoke", "edge-1")[0] == 0, "the command may be repeated without the wrong option"


def test_the_authoritys_key_may_have_a_passphrase(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("open sesame\n")
    assert run("ca", "--passphrase-file", "secret")[0] == 0
    assert b"ENCRYPTED" in (tmp_path / "ca" / "ca.key").read_bytes()
    assert run("issue", "edge-1", "--role", "edge", "--passphrase-file", "secret")[0] == 0
    assert "FLEET_CA_PASSPHRASE" in refused(run("issue", "edge-2", "--role", "edge"))
    monkeypatch.setenv("FLEET_CA_PASSPHRASE", "open sesame")
    assert run("issue", "edge-2", "--role", "edge")[0] == 0
    monkeypatch.setenv("FLEET_CA_PASSPHRASE", "guess")
    err = refused(run("issue", "edge-3", "--role", "edge"))
    assert "wrong" in err
    assert "guess" not in err
    assert not (tmp_path / "ca" / "issued" / "edge-3.key").exists()
    assert run("list")[0] == 0, "a list needs no key"


def test_a_record_names_who_acted_through_sudo(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "alice")
    run("ca")
    run("issue", "edge-1", "--role", "edge")
    assert [each["by"].partition(" as ")[0] for each in as_json(run("list", "--json"))] == ["alice"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("ca",), "There is an authority in ca already"),
        (("ca", "--ca", "new", "--fleet", "a/b"), "'a/b' is not a valid name"),
        (("ca", "--ca", "new", "--edge", "monitor-1"), "reserved"),
        (("ca", "--ca", "new", "--unit", "mosquitto", "--pid-file", "p"), "not both"),
        (("list", "--ca", "nowhere"), "in nowhere: make one with `fleet broker ca`, or correct --ca."),
        (("issue", "sensor-1", "--role", "device"), "A device's key never leaves it"),
        (("issue", "broker", "--role", "broker"), "Give --host for a broker"),
        (("issue", "edge-1", "--role", "edge", "--host", "a"), "and for no other role"),
        (("issue", "broker", "--role", "broker", "--host", "*.a"), "neither a host name nor an address"),
        (("issue", "e/1", "--role", "edge"), "is not a valid name"),
        (("sign", "sensor-1", "absent.csr"), "cannot be read"),
        (("sign", "sensor-1", "ca/ca.pem"), "no signing request in PEM"),
        (("sign", "edge-9", "dev.csr"), "is reserved"),
        (("sign", "north", "dev.csr"), "asks for 'sensor-1' and not for 'north'"),
        (("renew",), "Name the identities to renew"),
        (("renew", "sensor-9"), "There is no certificate for 'sensor-9'"),
        (("renew", "a", "b", "--request", "dev.csr"), "A request is for one name"),
        (("revoke", "sensor-9"), "There is no certificate for 'sensor-9'"),
        (("enroll", "edge-1"), "is reserved"),
        (("enroll", "sensor-1", "--ca", "ca/ca.pem"), "give --certificate too"),
        (
            ("enroll", "sensor-1", "--certificate", "ca/ca.pem", "--ca", "ca/ca.pem"),
            "There is no key in credentials yet",
        ),
        (("enroll", "sensor-1", "--certificate", "absent.pem", "--ca", "ca/ca.pem"), "cannot be read"),
        (("enroll", "sensor-1", "--new-key", "--certificate", "x"), "A new key needs a new request"),
    ],
)
@pytest.mark.usefixtures("ca")
def test_mistakes_are_one_sentence(run: Run, tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    run("enroll", "sensor-1", "--folder", "d")
    (tmp_path / "dev.csr").write_bytes((tmp_path / "d" / "device.csr").read_bytes())
    assert sentence in refused(run(*arguments))


@pytest.mark.usefixtures("ca")
def test_a_revocation_is_told_to_the_session_log_and_holds_without_it(run: Run, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    open_store(url).close()
    run("issue", "edge-1", "--role", "edge")
    assert run("revoke", "edge-1", "--db", url)[0] == 0
    [event] = SessionLog(url).events()
    assert (event.kind, event.code, event.device, event.severity) == ("identity", "revoked", "edge-1", "warning")
    assert event.who
    code, _, complaint = run("revoke", "edge-1", "--db", "sqlite:////nowhere/at/all.sqlite3")
    assert code == 0
    assert "revoke" in complaint
