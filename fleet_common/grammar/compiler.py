"""Compile each recent grammar once, in processes that may crash, and ban the grammars that crash two of them."""

import importlib.metadata
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Final

from fleet_common.grammar.bounds import bounded_text
from fleet_common.grammar.errors import GrammarBanned, GrammarBusy, GrammarError, GrammarKilled, GrammarUnavailable
from fleet_common.grammar.matcher import CompiledGrammar, GrammarMatcher, compile_alone
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.grammar.workers import GrammarWorkers
from fleet_common.host import write_atomically
from schemas.policy import Grammar

_log = logging.getLogger(__name__)


BANNED_FILE: Final = "banned-grammars"
"""In the edge's spool folder."""

_MOST_BANNED: Final = 1000
"""Number of banned grammars that are remembered. Each new one costs its sender strikes."""

_BANNED_S: Final = 86_400.0


class BannedGrammars:
    """Grammars that have ended two processes that compiled them; each is tried again after a day.

    Callable on any thread. `path` keeps them across restarts, one line each: llguidance's version, a digest, and when
    the ban ends (Unix time). Grammars banned under another version are tried again. Without it they are kept in memory.
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        try:
            self._version = importlib.metadata.version("llguidance")
        except importlib.metadata.PackageNotFoundError:
            self._version = "none"
        self._kept: dict[str, float] = {}

    def until(self) -> dict[str, float]:
        """Return when each ban ends, by digest."""
        found, now = self._kept if self._path is None else self._read(self._path), self._clock()
        # A longer ban is by a clock that was ahead; the file has whole seconds.
        return {digest: until for digest, until in found.items() if now < until <= now + _BANNED_S + 1.0}

    def check(self, grammar: Grammar) -> None:
        if grammar.digest in self.until():
            raise GrammarBanned

    def add(self, grammar: Grammar) -> None:
        """Ban a grammar, on disk too."""
        try:
            self._change({grammar.digest: self._clock() + _BANNED_S})
        except OSError as error:
            _log.warning("The grammar %s cannot be banned: %s", grammar.digest[:12], error)

    def lift(self, digest: str) -> None:
        """End a ban; raise OSError if the file cannot be written."""
        self._change({digest: 0.0})

    def _change(self, change: dict[str, float]) -> None:
        with self._lock:
            self._kept = dict(list((self.until() | change).items())[-_MOST_BANNED:])
            if self._path is not None:
                lines = (f"{self._version} {digest} {until:.0f}\n" for digest, until in self._kept.items())
                write_atomically(self._path, "".join(lines).encode("ascii"))

    def _read(self, path: Path) -> dict[str, float]:
        found: dict[str, float] = {}
        with suppress(OSError, ValueError):
            for line in path.read_text(encoding="ascii").splitlines():
                version, digest, until = line.split(" ")
                if version == self._version:
                    found[digest] = float(until)
        return found


_KEPT: Final = 64
"""Number of grammars that are remembered, with what follows at their beginning or why they cannot be used."""

_NOT_KEPT: Final = (GrammarUnavailable, GrammarBusy, GrammarBanned, GrammarKilled)
"""Errors that are not cached: the grammar may be usable later, or is remembered elsewhere."""


class GrammarCompiler:
    """Compile grammars. Callable on any thread.

    `load` builds the vocabulary when the first grammar comes. By default no grammar is banned, and none is kept across
    restarts.
    """

    def __init__(self, load: Callable[[], GrammarTokenizer], banned: BannedGrammars | None = None) -> None:
        self._workers = GrammarWorkers(load)
        self._banned = banned or BannedGrammars()
        self._kept: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()
        self._keeping = threading.Lock()

    def known(self, grammar: Grammar) -> CompiledGrammar | None:
        """Return the compiled grammar, None if that takes time; raise GrammarError if it is known to be unusable."""
        with self._keeping:
            kept = self._kept.get(grammar)
            if kept is None or not kept.done():
                return None
            self._kept.move_to_end(grammar)
        return _result(kept)

    def matcher(self, grammar: Grammar, device: str = "") -> GrammarMatcher:
        """Return a matcher at the start of a device's generation; raise GrammarError as `compiled` does."""
        return GrammarMatcher(self.compiled(grammar), device)

    def compiled(self, grammar: Grammar) -> CompiledGrammar:
        """Return the compiled grammar, after a second if it is new.

        Raise GrammarError if the grammar is invalid, unsupported, too complex, or allows no output.
        """
        with self._keeping:
            kept = self._kept.get(grammar)
            if mine := kept is None:
                kept = self._kept[grammar] = Future()
            self._kept.move_to_end(grammar)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        if mine:
            try:
                kept.set_result(self._compile(grammar))
            except BaseException as error:  # noqa: BLE001 - raised below, to those who wait for it too
                kept.set_exception(error)
                if not isinstance(error, GrammarError) or isinstance(error, _NOT_KEPT):
                    self._forget(grammar, kept)
        return _result(kept)

    def close(self) -> None:
        """End all grammar processes."""
        self._workers.close()

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        self._banned.check(grammar)
        text = bounded_text(grammar)
        try:
            return compile_alone(grammar, text, self._workers)
        except GrammarKilled:
            self._banned.add(grammar)
            raise

    def _forget(self, grammar: Grammar, kept: "Future[CompiledGrammar]") -> None:
        with self._keeping:
            if self._kept.get(grammar) is kept:
                del self._kept[grammar]


def _result(kept: "Future[CompiledGrammar]") -> CompiledGrammar:
    if (failure := kept.exception()) is not None:
        raise failure.with_traceback(None)  # which would grow each time
    return kept.result()
