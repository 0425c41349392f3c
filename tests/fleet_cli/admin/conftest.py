from functools import partial
from pathlib import Path

import pytest

from fleet_edge.session_log.database import open_store
from tests.support.command import Run


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    open_store(url).close()
    return url


@pytest.fixture
def admin(url: str, fleet: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("FLEET_DB", url)
    return partial(fleet, "admin")
