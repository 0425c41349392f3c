"""ReopeningStore: a database that may be away, also when an edge starts; opened, and migrated, whenever it is there."""

import logging
import threading
from collections.abc import Sequence
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self

from sqlalchemy import Engine

from fleet_edge.store.database import Store, open_store
from fleet_edge.store.errors import RecordRejected, StoreError, StoreRefused, StoreUnavailable
from fleet_edge.store.fences import Fences
from fleet_edge.store.records.record import Record

_log = logging.getLogger(__name__)


class Opener(Protocol):
    """Opens a database: `open_store`."""

    def __call__(self, url: str, /, *, create: bool) -> Store: ...


class ReopeningStore:
    """A store that is opened when it is first written, and anew after it was away.

    Only `open` and `apply` try to open it: whoever else asks while it is away is told so at once. A SQLite file that
    was there and is missing is waited for, not created again: it may come back, and an empty one would hide the loss.

    Args:
        url: `sqlite:///PATH` or `postgresql://USER[:PASSWORD]@HOST/NAME`.
        opener: Opens and migrates it; creates it if asked to.
    """

    def __init__(self, url: str, *, opener: Opener = open_store) -> None:
        self._url = url
        self._opener = opener
        self._store: Store | None = None
        self._kept: Store | None = None  # with all that was compiled for it; each new one would be megabytes of garbage
        self._lock = threading.Lock()

    @property
    def engine(self) -> Engine:
        """The engine of the open database, for housekeeping and queries.

        Raises:
            StoreUnavailable: It is away.
        """
        return self._opened().engine

    def open(self) -> None:
        """Try to open it now.

        Raises:
            StoreUnavailable: It is away; what is written later tries again.
            StoreRefused: It is there, and does not take us as we are configured.
            StoreError: The URL is wrong, the driver is missing, or the database is newer than this software.
        """
        with self._lock:
            if self._store is not None:
                return
            opened = self._opener(self._url, create=self._kept is None)
            if self._kept is None:
                self._kept = opened
            else:
                opened.close()  # it has found everything in order
            self._store = self._kept

    def apply(self, records: Sequence[Record]) -> None:
        """Merge records as `Store.apply` does, having opened the database if it is not open.

        Raises:
            StoreUnavailable: Nothing was stored; try again later. Also `StoreRefused`, if somebody has to change
                something first.
            RecordRejected: Nothing was stored, because of a record that never can be.
        """
        try:
            self.open()
            self._opened().apply(records)
        except RecordRejected:
            raise
        except StoreError as error:
            self.close()  # to be migrated, if need be, when it is back
            if isinstance(error, StoreUnavailable):
                raise
            # At the start this would have ended the edge; a running one keeps its records.
            raise StoreRefused(str(error)) from error

    def fences(self, *, now: datetime) -> Fences:
        """Return which devices are fenced at `now` (aware).

        Raises:
            StoreUnavailable: The database is away.
        """
        return self._opened().fences(now=now)

    def close(self) -> None:
        """Close all connections; what is written later opens it again. Idempotent."""
        with self._lock:
            store, self._store = self._store, None
        if store is not None:
            store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self) -> Store:
        store = self._store
        if store is None:
            raise StoreUnavailable("The database of the session log is not open; it is opened when it answers.")
        return store


def check_database(url: str) -> None:
    """Check that an edge can be started on a database; one that is away is no reason not to.

    It is created or migrated if it is there.

    Raises:
        StoreError: The URL is wrong, or the database does not take us as we are configured.
    """
    store = ReopeningStore(url)
    try:
        store.open()
    except StoreRefused:
        raise
    except StoreUnavailable as error:
        _log.debug("The database is away as the edge starts: %s", error)
    finally:
        store.close()
