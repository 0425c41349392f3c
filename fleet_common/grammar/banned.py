"""Banned grammars: those that have ended a process, which are not compiled again."""

import importlib.metadata
import logging
import threading
from pathlib import Path
from typing import Final

from fleet_common.grammar.errors import GrammarBanned
from schemas.grammar import Grammar

_log = logging.getLogger(__name__)

_MOST: Final = 1000
"""Grammars, the latest, that are remembered. Each new one costs whoever sends it strikes."""


class BannedGrammars:
    """Digests of grammars. Callable on any thread.

    Args:
        path: A file of lines that keeps them from one run to the next: llguidance's version and a digest. What another
            version could not bear is tried again. Without it they are kept in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._version = importlib.metadata.version("llguidance")
        except importlib.metadata.PackageNotFoundError:
            self._version = "none"
        self._digests: dict[str, None] = dict.fromkeys(self._read())

    def check(self, grammar: Grammar) -> None:
        """Refuse a grammar that is banned.

        Raises:
            GrammarBanned: It is.
        """
        if self._digests and grammar.digest in self._digests:
            raise GrammarBanned

    def add(self, grammar: Grammar) -> None:
        """Ban a grammar; on return that is on disk."""
        with self._lock:
            self._digests[grammar.digest] = None
            for oldest in list(self._digests)[:-_MOST]:
                del self._digests[oldest]
            if self._path is None:
                return
            lines = "".join(f"{self._version} {digest}\n" for digest in self._digests)
            beside = self._path.with_suffix(".new")
            try:
                beside.write_text(lines, encoding="ascii")
                beside.replace(self._path)
            except OSError as error:
                _log.warning("The grammar %s is banned until this edge ends: %s", grammar.digest[:12], error)

    def _read(self) -> list[str]:
        try:
            lines = [] if self._path is None else self._path.read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError):
            lines = []
        return [digest for version, _, digest in (line.partition(" ") for line in lines) if version == self._version]
