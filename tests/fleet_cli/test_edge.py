import json
from functools import partial
from pathlib import Path

import pytest

from fleet_common.checks import Check
from fleet_common.grammar.compiler import BANNED_FILE, BannedGrammars
from fleet_common.identity.certificates import IdentityRole
from fleet_device.checks.edge_check import EdgeCheck
from schemas.policy import Grammar
from tests.support.command import Run, refused
from tests.support.tls_fleet import enrol, new_authority


@pytest.fixture
def edge(fleet: Run) -> Run:
    return partial(fleet, "edge")


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet_cli.edge.check_target_files", lambda _settings: None)
    monkeypatch.setattr("fleet_cli.edge.read_target_tokens", lambda _settings: ["a", "b", "c", "d"])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[EdgeCheck]:
    asked = list[EdgeCheck]()

    def run(check: EdgeCheck) -> list[Check]:
        asked.append(check)
        return []

    monkeypatch.setattr(EdgeCheck, "run", run)
    return asked


@pytest.mark.parametrize("command", ["run", "selftest"])
def test_a_missing_target_is_reported(edge: Run, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = edge(command, "--target", "nowhere")
    assert (code, out) == (2, "")
    assert "nowhere" in err.splitlines()[0]


def test_mistakes_are_reported_before_loading(edge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").write_bytes(b"")
    code, _, err = edge("run", "--target", str(target), "--db", "sqlite:////no/such/folder/log.sqlite3", "--port", "1")
    assert code == 2
    assert [line.partition(":")[0] for line in err.splitlines()] == ["fleet", "fleet"]
    assert "/no/such/folder" in err
    assert "No broker listens at 127.0.0.1:1" in err
    assert "Loading" not in err


@pytest.mark.usefixtures("tokens")
def test_a_selftest_without_a_broker_says_so_and_ends_with_1(edge: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet_device.checks.edge_check._CONNECT_S", 0.2)
    code, out, _ = edge("selftest", "--port", "1", "--json")
    report = json.loads(out)
    assert code == 1
    assert [check["name"] for check in report["checks"]] == ["broker", "edge", "rejection", "acceptance"]
    assert "127.0.0.1:1" in report["checks"][0]["sentence"]
    code, out, _ = edge("selftest", "--port", "1")
    assert code == 1
    assert out.splitlines()[0].startswith("FAILED  broker")


@pytest.mark.usefixtures("tokens")
def test_a_selftest_asks_as_the_edges_probe(edge: Run, asked: list[EdgeCheck]) -> None:
    assert edge("selftest", "--edge", "north", "--fleet", "home")[0] == 0
    assert edge("selftest", "--probe", "other")[0] == 0
    found = [(check.fleet, check.name) for check in asked]
    assert found == [("home", "probe-north"), ("fleet", "other")]


@pytest.mark.usefixtures("tokens")
def test_a_selftest_as_the_edge_itself_is_refused(edge: Run, asked: list[EdgeCheck], tmp_path: Path) -> None:
    authority = new_authority(tmp_path / "ca")
    own = enrol(authority, "north", tmp_path, IdentityRole.EDGE)
    config = tmp_path / "edge.toml"
    config.write_text(
        f'edge = "north"\n[broker]\nca = "{own.ca}"\ncertificate = "{own.certificate}"\nkey = "{own.key}"\n'
    )
    err = refused(edge("selftest", "--config", config))
    assert asked == []
    for said in (str(own.certificate), "fleet edge enroll probe-north", "--certificate", "--key"):
        assert said in err
    assert edge("selftest", "--config", str(config), "--probe", "north")[0] == 2
    probe = enrol(authority, "probe-north", tmp_path)
    files = ("--certificate", str(probe.certificate), "--key", str(probe.key))
    assert edge("selftest", "--config", str(config), *files)[0] == 0
    assert "probe-north" in refused(edge("selftest", "--config", config, *files, "--probe", "another"))
    assert [check.name for check in asked] == ["probe-north"]


@pytest.mark.usefixtures("tokens")
def test_a_selftest_under_the_edges_own_name_is_refused_without_tls_too(edge: Run, asked: list[EdgeCheck]) -> None:
    assert "--probe" in refused(edge("selftest", "--edge", "north", "--probe", "north"))
    assert asked == []


def test_banned_grammars_are_listed_and_allowed_again(edge: Run, tmp_path: Path) -> None:
    banned = BannedGrammars(tmp_path / BANNED_FILE)
    banned.add(Grammar.regex("a"))
    banned.add(Grammar.regex("b"))
    digest = Grammar.regex("a").digest
    spool = ("--spool", str(tmp_path))
    assert digest in edge("grammars", *spool)[1]
    assert edge("grammars", "--lift", "", *spool)[0] == 2
    assert edge("grammars", "--lift", digest[:12], *spool)[0] == 0
    assert list(banned.until()) == [Grammar.regex("b").digest]
    assert edge("grammars", "--lift", digest, *spool)[0] == 2
