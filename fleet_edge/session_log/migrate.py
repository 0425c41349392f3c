"""Migrations: bring a database to this version's tables, safely when two processes start at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from fleet_common.host import locked
from fleet_edge.session_log.errors import StoreError
from fleet_edge.session_log.tables import REVISION

_SCRIPTS = Path(__file__).parent / "migrations"

# An arbitrary number, the same in every process that migrates.
_ADVISORY_LOCK: Final = 0x6473_7364_666C_6565


def configuration() -> Config:
    """Return Alembic's configuration: there is no ini file, the scripts are part of the package."""
    config = Config()
    # Config interpolates percent signs.
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    return config


def migrate(engine: Engine, *, path: Path | None, name: str) -> None:
    """Create or upgrade the tables, all or nothing; `path` is the SQLite file, `name` the database for people.

    Raises `StoreError` if a newer version wrote the database, `SQLAlchemyError` if it cannot be changed.
    """
    with _alone(path), engine.connect() as connection:
        if path:
            # Kept in the file. Switching needs the file alone, and would fail rather than wait.
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            # Python's driver would begin only at the first insert, and leave schema changes outside.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            # Waiting for another process, or rewriting a large table, may take long.
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
        if _behind(connection, name=name):
            config = configuration()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        connection.commit()


def _behind(connection: Connection, *, name: str) -> bool:
    current = MigrationContext.configure(connection).get_current_revision()
    if current == REVISION:
        return False
    known = {script.revision for script in ScriptDirectory.from_config(configuration()).walk_revisions()}
    if current is not None and current not in known:
        raise StoreError(
            f"The database {name} was written by a newer version of this software (schema {current}, "
            f"known up to {REVISION}); upgrade this installation or use another database."
        )
    return True


@contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    """Lock the database's folder, so that of two processes on one file the second waits.

    The folder, because closing any handle of the file itself would drop SQLite's own locks on it.
    """
    if path is None:
        yield
        return
    with locked(path.parent):
        yield
