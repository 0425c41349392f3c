import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import SUITES, main
from benchmarks.harness import Bench, SuiteReport, add_curve, run_suite
from tests.support.brokers import require_mosquitto
from tests.support.played_steps import CURVE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(SUITES))
def test_each_suite_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([*name.split(), "--help"])
    assert leaving.value.code == 0
    assert f"benchmarks {name}" in capsys.readouterr().out


def test_what_a_suite_sets_in_the_environment_ends_with_it(tmp_path: Path) -> None:
    class Suite:
        add_options = staticmethod(add_curve)

        @staticmethod
        def run(_bench: Bench) -> SuiteReport:
            assert os.environ[CURVE] == str(tmp_path / "curve.json")
            os.environ["OF_A_SUITE"] = "1"
            return SuiteReport([], [])

    before = dict(os.environ)
    assert run_suite("suite", Suite, ["--curve", str(tmp_path / "curve.json")]) == 0
    assert dict(os.environ) == before


def test_the_list_needs_no_package() -> None:
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        "import runpy, sys; sys.path.insert(0, '.'); sys.argv = ['benchmarks']",
    ]
    command[-1] += "; runpy.run_module('benchmarks', run_name='__main__')"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(name in done.stdout and summary in done.stdout for name, (_, summary) in SUITES.items())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else found(name))
    assert main(["administration", "log"]) == 2
    said = capsys.readouterr().err
    assert "scipy" in said
    assert "make bench" in said


@pytest.mark.parametrize("words", [["no-such-suite"], ["engines", "--quick"]])
def test_what_cannot_be_run_is_refused(words: list[str]) -> None:
    assert main(words) == 2


@pytest.mark.broker
@pytest.mark.parametrize(
    "words",
    [
        "overhead verdicts --answers 100 --devices 4 --seconds 0.5",
        "administration steering --devices 3 --rounds 2",
        "exactness system --sessions 40 --only stopped",
    ],
)
def test_a_short_run_writes_its_figures(words: str, tmp_path: Path) -> None:
    require_mosquitto()
    report = tmp_path / "report.json"
    assert main([*words.split(), "--json", str(report)]) in {0, 1}  # 1 on a busy machine
    found = json.loads(report.read_text())
    assert found["rows"]
    assert {"commit", "versions", "machine", "at", "settings", "goals", "wrong"} <= set(found)
    assert not found["wrong"] or "exactness" in words  # forty sessions prove nothing
