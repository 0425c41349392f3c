import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import harness
from benchmarks.harness import Bench, Report, at_least, at_most, run_suite, together


def suite(run: Any) -> Any:
    return SimpleNamespace(__doc__="A suite.", add_options=lambda parser: parser.add_argument("--more"), run=run)


def test_a_report_is_kept_and_a_missed_goal_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    goals = [at_most("milliseconds", 3.0, 5.0), at_least("tokens", 4.0, 5.0)]
    found = suite(lambda _bench: Report([{"a": 1}], goals, more={"extra": 2}))
    assert run_suite("one", found, ["--json", str(file), "--more", "x"]) == 1
    kept = json.loads(file.read_text())
    assert (kept["rows"], kept["extra"], kept["settings"]["more"]) == ([{"a": 1}], 2, "x")
    assert [goal["reached"] for goal in kept["goals"]] == [True, False]
    assert capsys.readouterr().out.count("goal") == 2
    assert run_suite("one", suite(lambda _bench: Report([])), []) == 0
    assert run_suite("one", suite(lambda _bench: Report([], wrong=["It is."])), []) == 1


def test_sigterm_ends_a_suite_with_its_clean_up() -> None:
    cleaned = []

    def work(_bench: Bench) -> Report:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)
        return Report([])

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_suite("one", suite(work), [])
    assert cleaned
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_calls_run_at_the_same_time_and_the_first_error_is_raised() -> None:
    assert together([lambda n=n: n * n for n in range(4)]) == [0, 1, 4, 9]  # type: ignore[misc]
    with pytest.raises(ZeroDivisionError):
        together([lambda: 1, lambda: 1 // 0])


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *who, "-C", str(folder), *arguments], check=True, capture_output=True)


def test_the_commit_says_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    module = tmp_path / "module.py"
    module.write_text("1\n")
    for words in (
        ["init", "-q"],
        ["add", "module.py"],
        ["commit", "-q", "-m", "first"],
        ["tag", "-a", "v9", "-m", "x"],
    ):
        git(tmp_path, *words)
    monkeypatch.setattr(harness, "__file__", str(module))
    clean = harness.commit()
    assert clean is not None
    assert len(clean) == 12
    module.write_text("2\n")
    assert harness.commit() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert harness.commit() is None
