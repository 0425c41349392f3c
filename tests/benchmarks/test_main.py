import importlib.util

import pytest

from benchmarks.__main__ import SUITES, main


@pytest.mark.parametrize("name", sorted(SUITES))
def test_each_suite_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([name, "--help"])
    assert leaving.value.code == 0
    assert f"benchmarks {name}" in capsys.readouterr().out


def test_a_missing_package_is_named_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else found(name))
    assert main(["log"]) == 2
    said = capsys.readouterr().err
    assert "scipy" in said
    assert "make bench" in said


def test_an_unknown_suite_is_refused() -> None:
    assert main(["no-such-suite"]) == 2
