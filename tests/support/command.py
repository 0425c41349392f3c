"""The command `fleet` as tests run it, in their own process."""

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from fleet_cli.main import run

Run = Callable[..., tuple[int, str, str]]
"""Takes arguments and standard input; returns exit code, standard output and standard error."""


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object, given: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fleet", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        with pytest.raises(SystemExit) as leaving:
            run()
        said = capsys.readouterr()
        return int(leaving.value.code or 0), said.out, said.err

    return call


def refused(outcome: tuple[int, str, str]) -> str:
    """Return the sentence of a command that did nothing but refuse."""
    code, output, complaint = outcome
    assert (code, output) == (2, ""), complaint
    assert complaint.startswith("fleet: ")
    assert complaint.count("\n") == 1
    return complaint


def as_json(outcome: tuple[int, str, str], code: int = 0) -> Any:
    """Return what was printed; it must have ended with that code."""
    found, output, complaint = outcome
    assert found == code, complaint
    return json.loads(output)
