"""TLS files of a link, watched: a renewed certificate is taken into use without a restart.

Three things must not happen on the way: that a pair is used of which only one file has been replaced yet, that a
renewal which cannot work ends a connection that does, and that one which the broker refuses keeps us away from it.
"""

import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fleet_common.mqtt.errors import ConnectFailed
from fleet_common.mqtt.settings import TlsSettings
from fleet_common.mqtt.tls.context import LinkContext, tls_context

LOOK_S: Final = 1.0
RETRY_S: Final = 600.0  # before files that the broker refused are tried again

_log = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, ...] | None, ...]


class Credentials:
    """Decides which context a connection is made with. Belongs to the link's thread.

    Args:
        tls: The files; None for plain TCP.
        clock: Monotonic seconds.
        now: The time, with its time zone.
    """

    def __init__(
        self,
        tls: TlsSettings | None,
        *,
        clock: Callable[[], float],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._tls = tls
        self._clock = clock
        self._now = now
        self._proven: LinkContext | None = None  # a connection was made with it
        self._proven_stamp: _Stamp = ()
        self._tried: LinkContext | None = None
        self._tried_stamp: _Stamp = ()
        self._unfit: _Stamp = ()  # files that do not fit together, or that the broker refused
        self._unfit_until = 0.0
        self._looked_at = -LOOK_S

    def take(self) -> LinkContext | None:
        """Return the context for a new connection, None for plain TCP.

        Raises:
            ConnectFailed: The files cannot be used, and there are none from before.
        """
        if self._tls is None:
            return None
        stamp = _stamp(self._tls)
        self._tried, self._tried_stamp = self._proven, self._proven_stamp
        if self._tried is None or self._new(stamp):
            try:
                self._tried, self._tried_stamp = tls_context(self._tls, now=self._now()), stamp
            except ConnectFailed as error:
                if self._tried is None:
                    raise
                self._reject(stamp, str(error))
        self._tried.alert = None
        return self._tried

    def accepted(self) -> None:
        """Note that the connection was made."""
        self._proven, self._proven_stamp = self._tried, self._tried_stamp

    def refused(self, why: str) -> None:
        """Note that it was not; if what was tried was new, what worked before is tried next."""
        if self._proven is not None and self._tried_stamp != self._proven_stamp:
            self._reject(self._tried_stamp, why)

    def renewed(self) -> bool:
        """Whether usable files lie there that this connection was not made with. Looks once a second at most."""
        if self._tls is None or self._clock() - self._looked_at < LOOK_S:
            return False
        self._looked_at = self._clock()
        stamp = _stamp(self._tls)
        if not self._new(stamp):
            return False
        try:
            tls_context(self._tls, now=self._now())
        except ConnectFailed as error:
            self._reject(stamp, str(error))
            return False
        return True

    def _new(self, stamp: _Stamp) -> bool:
        unfit = stamp == self._unfit and self._clock() < self._unfit_until
        return stamp != self._proven_stamp and not unfit

    def _reject(self, stamp: _Stamp, why: str) -> None:
        if stamp != self._unfit:
            _log.warning("The renewed TLS files are not used yet, what worked before is: %s", why)
        self._unfit, self._unfit_until = stamp, self._clock() + RETRY_S


def _stamp(tls: TlsSettings) -> _Stamp:
    return tuple(_facts(path) for path in (tls.ca, tls.certificate, tls.key) if path is not None)


def _facts(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is replaced or written, None if it is away for the moment."""
    try:
        found = os.stat(path)  # noqa: PTH116 - follows links, as configuration tools set them
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
