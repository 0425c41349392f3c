"""Accounts' part of the session log's database: opened to write, with its errors as sentences."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from fleet_edge.store.database import open_existing
from fleet_edge.store.engine import parse_url, shown, unavailable


class AccountDatabase:
    """A database with accounts, open to write. May be used by several threads.

    Args:
        url: As of the session log.

    Raises:
        StoreError: It cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self._name = shown(parse_url(url))
        self._engine = open_existing(url, read_only=False)
        weakref.finalize(self, self._engine.dispose)

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Hold a transaction.

        Raises:
            StoreUnavailable: The database does not answer, or may not be written.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise unavailable(error, name=self._name) from error

    def close(self) -> None:
        self._engine.dispose()
