import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet_edge.session_log.database import Store, open_store
from fleet_edge.session_log.log import SessionLog
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.samples import after


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    with open_store(database_url) as opened:
        yield opened


@pytest.fixture
def sqlite_store(tmp_path: Path, tables: Path) -> Iterator[Store]:
    with open_store(f"sqlite:///{shutil.copy(tables, tmp_path)}") as opened:
        yield opened


@pytest.fixture
def log(store: Store, database_url: str) -> Iterator[SessionLog]:
    del store  # creates the tables
    with SessionLog(database_url, now=lambda: after(7300)) as opened:
        yield opened


@pytest.fixture
def fleet_log(store: Store, log: SessionLog) -> SessionLog:
    """Return a log in which `samples.fleet` has been stored."""
    store.apply(samples.fleet())
    return log
