import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection

from fleet_edge.store.database import Store, open_store
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.postgres import PostgresServer, running_server

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
def connection(store: Store) -> Iterator[Connection]:
    """Return a connection to a database in which `samples.fleet` has been stored."""
    store.apply(samples.fleet())
    with store.engine.connect() as opened:
        yield opened
