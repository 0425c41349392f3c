import re
from pathlib import Path

import psycopg
import pytest

from fleet_edge.session_log import SessionLog
from fleet_edge.store.database import open_store
from fleet_edge.store.errors import StoreError
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.postgres import PostgresServer

PAGE = Path(__file__).parents[3] / "docs" / "database.md"


def _statements() -> list[str]:
    page = PAGE.read_text(encoding="utf-8")
    block = page[page.index("CREATE ROLE fleet_edge") : page.index("before the first edge")]
    return [line.strip() for line in block.splitlines() if line.strip()]


@pytest.mark.postgres
def test_an_edge_writes_and_a_reader_reads_with_the_roles_of_the_page(postgres: PostgresServer) -> None:
    superuser = postgres.database()
    socket = re.sub(r".*host=", "", superuser)
    database = "postgres"
    for statement in _statements():
        if statement.startswith("\\connect"):
            database = statement.split()[1]
            continue
        with psycopg.connect(f"host={socket} user=fleet dbname={database}", autocommit=True) as connection:
            connection.execute(statement.encode())
    edge, reader = (f"postgresql://{role}@/fleet?host={socket}" for role in ("fleet_edge", "fleet_reader"))
    with open_store(edge) as store:
        store.apply(samples.fleet())
    with SessionLog(reader) as log:
        assert len(log.sessions()) == 3
        assert log.stats()["all"].tokens == 47
        with pytest.raises(StoreError, match="permission denied"):
            log.quarantine("sensor-1")
    with (
        psycopg.connect(f"host={socket} user=fleet_reader dbname=fleet") as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(b"DELETE FROM sessions")
    with pytest.raises(StoreError, match="permission denied"):
        open_store(f"postgresql://fleet_reader@/fleet_1?host={socket}")
