"""Compiler of grammars: each is compiled once as long as it is among the latest, in a process that may die of it."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Final

from fleet_common.grammar.banned import BannedGrammars
from fleet_common.grammar.bounds import bounded_text
from fleet_common.grammar.errors import GrammarBanned, GrammarBusy, GrammarError, GrammarUnavailable
from fleet_common.grammar.matcher import GrammarMatcher
from fleet_common.grammar.process import CompiledGrammar, GrammarProcess
from fleet_common.grammar.tokenizer import GrammarTokenizer
from schemas.grammar import Grammar

_KEPT: Final = 32
"""Grammars that are kept compiled, or known to be unusable."""

_AT_ONCE: Final = 2
"""Grammars that are compiled at the same time."""

_MOST_KB: Final = 512 << 10
_PROCESS_KB: Final = 2 << 10
"""Kilobytes that all grammars may take together, and that each takes for its process."""

_NOT_KEPT: Final = (GrammarUnavailable, GrammarBusy, GrammarBanned)
"""What may be usable later, or is remembered elsewhere."""


def compile_grammar(grammar: Grammar, tokenizer: GrammarTokenizer) -> GrammarMatcher:
    """Return a matcher at the beginning of a generation. Takes a second or two.

    Raises:
        GrammarError: The grammar cannot be read, uses what is not supported, allows no text, or is too complex.
    """
    compiler = GrammarCompiler(lambda: tokenizer)
    try:
        return compiler.matcher(grammar)
    finally:
        compiler.close()


class GrammarCompiler:
    """Compiles grammars. Callable on any thread.

    Args:
        load: Builds the vocabulary, when the first grammar comes.
        banned: Grammars that have ended a process; by default none is known yet, and none is remembered for long.
    """

    def __init__(self, load: Callable[[], GrammarTokenizer], banned: BannedGrammars | None = None) -> None:
        self._load = load
        self._banned = banned or BannedGrammars()
        self._process: GrammarProcess | None = None
        self._starting = threading.Lock()
        self._kept: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()
        self._keeping = threading.Lock()
        self._places = threading.BoundedSemaphore(_AT_ONCE)
        self._living: weakref.WeakSet[CompiledGrammar] = weakref.WeakSet()  # those in use that are not kept, too

    def knows(self, grammar: Grammar) -> bool:
        """Whether a matcher, or the reason why there is none, is there at once."""
        kept = self._kept.get(grammar)
        return kept is not None and kept.done()

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """Return a matcher at the beginning of a generation.

        Raises:
            GrammarError: See `compile_grammar`.
        """
        return GrammarMatcher(self.compiled(grammar))

    def compiled(self, grammar: Grammar) -> CompiledGrammar:
        """Return a grammar, compiled.

        Raises:
            GrammarError: See `compile_grammar`.
        """
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
        """End the process that compiles; what is compiled can be used further."""
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
                raise GrammarBusy("The grammars in use take all the memory that they may; try again shortly.")
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
