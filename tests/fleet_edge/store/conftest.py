import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fleet_edge.session_log import SessionLog
from fleet_edge.store.database import Store, open_store
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.postgres import PostgresServer, running_server
from tests.fleet_edge.store.samples import after

postgres = pytest.fixture(scope="session")(running_server)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def empty_databases(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    if request.param == "sqlite":
        numbers = itertools.count()
        return lambda: f"sqlite:///{tmp_path / f'fleet-{next(numbers)}.sqlite3'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.database


@pytest.fixture
def database_url(empty_databases: Callable[[], str]) -> str:
    return empty_databases()


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    with open_store(database_url) as opened:
        yield opened


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Iterator[Store]:
    with open_store(f"sqlite:///{tmp_path / 'fleet.sqlite3'}") as opened:
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
