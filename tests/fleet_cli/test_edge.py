import json
import sys
from collections.abc import Callable

import pytest

from fleet_cli.main import main
from fleet_device.checks.edge_check import CHECKS, EdgeCheck, EdgeReport

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def edge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `fleet edge` and returns exit code, output and complaint."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fleet", "edge", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
        said = capsys.readouterr()
        return int(leaving.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target whose token strings are read in no time."""
    monkeypatch.setattr("fleet_cli.edge.selftest.target_tokens", lambda _source: ["a", "b", "c", "d"])


@pytest.mark.parametrize("command", ["run", "selftest"])
def test_a_target_that_is_not_there_is_one_sentence_and_exit_code_2(edge: Run, command: str) -> None:
    code, out, err = edge(command, "--target", "nowhere")
    assert (code, out) == (2, "")
    assert "There is no folder or file nowhere" in err.splitlines()[-1]


@pytest.mark.usefixtures("tokens")
def test_a_selftest_without_a_broker_says_so_and_ends_with_1(edge: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet_device.checks.edge_check._CONNECT_S", 0.2)
    code, out, _ = edge("selftest", "--port", "1", "--json")
    report = json.loads(out)
    assert code == 1
    assert [check["name"] for check in report["checks"]] == list(CHECKS)
    assert "127.0.0.1:1" in report["checks"][0]["sentence"]
    code, out, _ = edge("selftest", "--port", "1")
    assert code == 1
    assert out.splitlines()[0].startswith("FAILED broker")


@pytest.mark.usefixtures("tokens")
def test_a_selftest_asks_as_the_edges_probe(edge: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[EdgeCheck]()

    def run(check: EdgeCheck) -> EdgeReport:
        asked.append(check)
        return EdgeReport(check.question.edge, ())

    monkeypatch.setattr(EdgeCheck, "run", run)
    assert edge("selftest", "--edge", "north", "--fleet", "home")[0] == 0
    assert edge("selftest", "--probe", "other")[0] == 0
    assert [(check.question.fleet, check.question.name) for check in asked] == [
        ("home", "probe-north"),
        ("fleet", "other"),
    ]
