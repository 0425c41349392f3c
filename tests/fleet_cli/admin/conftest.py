import io
import sys
from pathlib import Path

import pytest

from fleet_cli.main import main
from fleet_edge.store.database import open_store
from tests.support.admin_command import Run


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    open_store(url).close()
    return url


@pytest.fixture
def admin(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str, given: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fleet", "admin", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        with pytest.raises(SystemExit) as leaving:
            main()
        said = capsys.readouterr()
        return int(leaving.value.code or 0), said.out, said.err

    monkeypatch.setenv("FLEET_DB", url)
    return run
