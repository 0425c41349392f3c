"""Compile each recent grammar once, in a process that may crash, and ban the grammars that crash it."""

import importlib.metadata
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Final

from fleet_common.grammar.bounds import bounded_text
from fleet_common.grammar.errors import GrammarBanned, GrammarBusy, GrammarError, GrammarUnavailable
from fleet_common.grammar.process import CompiledGrammar, GrammarMatcher, GrammarProcess, GrammarTokenizer
from fleet_common.host import write_atomically
from schemas.policy import Grammar

_log = logging.getLogger(__name__)


_MOST_BANNED: Final = 1000
"""Number of banned grammars that are remembered. Each new one costs its sender strikes."""


class BannedGrammars:
    """Digests of grammars that have ended a process. Callable on any thread.

    `path` keeps them across restarts, one line each: llguidance's version and a digest. Grammars banned under another
    version are tried again. Without it they are kept in memory.
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
        if self._digests and grammar.digest in self._digests:
            raise GrammarBanned

    def add(self, grammar: Grammar) -> None:
        """Ban a grammar, on disk too."""
        with self._lock:
            self._digests[grammar.digest] = None
            for oldest in list(self._digests)[:-_MOST_BANNED]:
                del self._digests[oldest]
            if self._path is None:
                return
            lines = "".join(f"{self._version} {digest}\n" for digest in self._digests)
            try:
                write_atomically(self._path, lines.encode("ascii"))
            except OSError as error:
                _log.warning("The grammar %s is banned only until this edge stops: %s", grammar.digest[:12], error)

    def _read(self) -> list[str]:
        try:
            lines = [] if self._path is None else self._path.read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError):
            lines = []
        return [digest for version, _, digest in (line.partition(" ") for line in lines) if version == self._version]


_KEPT: Final = 32
"""Number of grammars that are kept compiled or known to be unusable."""

_AT_ONCE: Final = 2
"""Number of grammars compiled at the same time."""

_MOST_KB: Final = 512 << 10
_PROCESS_KB: Final = 2 << 10
"""Memory of all grammars together, and of the process of each."""

_NOT_KEPT: Final = (GrammarUnavailable, GrammarBusy, GrammarBanned)
"""Errors that are not cached: the grammar may be usable later, or is remembered elsewhere."""


def compile_grammar(grammar: Grammar, tokenizer: GrammarTokenizer) -> GrammarMatcher:
    """Return a matcher at the start of a generation; takes one to two seconds.

    Raise GrammarError if the grammar is invalid, unsupported, too complex, or allows no output.
    """
    compiler = GrammarCompiler(lambda: tokenizer)
    try:
        return compiler.matcher(grammar)
    finally:
        compiler.close()


class GrammarCompiler:
    """Compile grammars. Callable on any thread.

    `load` builds the vocabulary when the first grammar comes. By default no grammar is banned, and none is kept across
    restarts.
    """

    def __init__(self, load: Callable[[], GrammarTokenizer], banned: BannedGrammars | None = None) -> None:
        self._load = load
        self._banned = banned or BannedGrammars()
        self._process: GrammarProcess | None = None
        self._starting = threading.Lock()
        self._kept: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()
        self._keeping = threading.Lock()
        self._places = threading.BoundedSemaphore(_AT_ONCE)
        self._living: weakref.WeakSet[CompiledGrammar] = weakref.WeakSet()  # also those in use but not kept

    def knows(self, grammar: Grammar) -> bool:
        """Whether a matcher, or the reason why there is none, is available at once."""
        kept = self._kept.get(grammar)
        return kept is not None and kept.done()

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """Return a matcher at the start of a generation; raise GrammarError as `compile_grammar` does."""
        return GrammarMatcher(self.compiled(grammar))

    def compiled(self, grammar: Grammar) -> CompiledGrammar:
        """Return the compiled grammar; raise GrammarError as `compile_grammar` does."""
        with self._keeping:
            kept = self._kept.get(grammar)
            if kept is not None and kept.done() and kept.exception() is None and not kept.result().usable:
                kept = None  # its process has ended
            if mine := kept is None:
                kept = self._kept[grammar] = Future()
            self._kept.move_to_end(grammar)
        if mine:
            try:
                kept.set_result(self._compile(grammar))
            except BaseException as error:  # noqa: BLE001 - raised below, to those who wait for it too
                kept.set_exception(error)
                if not isinstance(error, GrammarError) or isinstance(error, _NOT_KEPT):
                    self._forget(grammar, kept)
        if (failure := kept.exception()) is not None:
            raise failure.with_traceback(None)  # which would grow each time
        return kept.result()

    def close(self) -> None:
        """End the process that compiles; compiled grammars stay usable."""
        with self._starting:
            if self._process is not None:
                self._process.close()
                self._process = None

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        self._banned.check(grammar)
        text = bounded_text(grammar)
        with self._places:
            found = self._compile_apart(grammar, text)
        with self._keeping:
            self._living.add(found)
            while len(self._kept) > _KEPT or (len(self._kept) > 1 and self._memory_kb() > _MOST_KB):
                self._kept.popitem(last=False)
            if self._memory_kb() > _MOST_KB:
                raise GrammarBusy("The grammars in use take all memory allowed for grammars; try again shortly.")
        return found

    def _memory_kb(self) -> int:
        return sum(each.memory_kb + _PROCESS_KB for each in self._living)

    def _compile_apart(self, grammar: Grammar, text: str) -> CompiledGrammar:
        with suppress(OSError):
            return self._running().compile(grammar, text, self._banned.add)
        self.close()
        try:
            return self._running().compile(grammar, text, self._banned.add)
        except OSError as error:
            raise GrammarUnavailable(f"The grammar worker does not answer: {error.strerror or error}.") from None

    def _running(self) -> GrammarProcess:
        with self._starting:
            if self._process is None:
                self._process = GrammarProcess(self._load())
            return self._process

    def _forget(self, grammar: Grammar, kept: "Future[CompiledGrammar]") -> None:
        with self._keeping:
            if self._kept.get(grammar) is kept:
                del self._kept[grammar]
