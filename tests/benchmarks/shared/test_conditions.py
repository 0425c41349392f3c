import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.shared import conditions
from schemas.version import VERSION


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
    )


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of its own, from which the module seems to be run."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    module = tmp_path / "module.py"
    module.write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "module.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "tag", "-a", "v9", "-m", "not a commit's name")
    monkeypatch.setattr(conditions, "__file__", str(module))
    return tmp_path


def test_conditions_are_json_and_name_what_is_installed() -> None:
    found = json.loads(json.dumps(conditions.conditions("pytest", "no-such-distribution")))
    assert found["versions"]["dssd-fleet"] == VERSION
    assert found["versions"]["pytest"] == pytest.__version__
    assert "no-such-distribution" not in found["versions"]
    assert "mosquitto" not in found["versions"]
    assert found["machine"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert found["machine"]["cpu"]


def test_the_commit_says_whether_files_differ_from_it(checkout: Path) -> None:
    clean = conditions.commit()
    assert clean is not None
    assert len(clean) == 12
    (checkout / "module.py").write_text("2\n")
    assert conditions.commit() == f"{clean}-dirty"


def test_code_below_the_checkout_of_something_else_has_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = checkout / "installed.py"
    installed.write_text("1\n")
    monkeypatch.setattr(conditions, "__file__", str(installed))
    assert conditions.commit() is None


def test_a_machine_without_git_has_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout / "empty"))
    assert conditions.commit() is None
