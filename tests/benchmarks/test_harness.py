import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.harness import Bench, SuiteReport, at_least, at_most, run_suite


def suite(run: Any) -> Any:
    return SimpleNamespace(__doc__="A suite.", add_options=lambda parser: parser.add_argument("--more"), run=run)


def test_a_report_is_kept_and_a_missed_goal_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    goals = [at_most("milliseconds", 3.0, 5.0), at_least("tokens", 4.0, 5.0)]
    found = suite(lambda _bench: SuiteReport([{"a": 1}], goals, more={"extra": 2}))
    assert run_suite("one", found, ["--json", str(file), "--more", "x"]) == 1
    kept = json.loads(file.read_text())
    assert (kept["rows"], kept["extra"], kept["settings"]["more"]) == ([{"a": 1}], 2, "x")
    assert [goal["reached"] for goal in kept["goals"]] == [True, False]
    assert capsys.readouterr().out.count("goal") == 2
    assert run_suite("one", suite(lambda _bench: SuiteReport([])), []) == 0
    assert run_suite("one", suite(lambda _bench: SuiteReport([], wrong=["It is."])), []) == 1


def test_sigterm_ends_a_suite_with_its_clean_up() -> None:
    cleaned = []

    def work(_bench: Bench) -> SuiteReport:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)
        return SuiteReport([])

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_suite("one", suite(work), [])
    assert cleaned
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
