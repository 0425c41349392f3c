"""Compiled grammars, and the position of a generation in one."""

import itertools
import zlib
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleet_common.grammar.errors import (
    GrammarBusy,
    GrammarError,
    GrammarKilled,
    GrammarNotReady,
    OutsideGrammar,
    unusable,
)
from fleet_common.grammar.messages import GrammarRequest, Op, Status, numbers_of
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.grammar.workers import GrammarWorkers, WorkerEnded
from schemas.policy import Grammar

_TRIES: Final = 4
"""Workers that may end, or fail, before a generation is given up."""

_NUMBERS: Final = itertools.count(1)


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar that a process of its own has compiled, with what follows at the beginning.

    `message` is its form in requests, `compile_s` the processor time that compiling it took.
    """

    grammar: Grammar
    message: bytes
    workers: GrammarWorkers
    tokenizer: GrammarTokenizer
    first_allowed: NDArray[np.int64]
    first_forced: tuple[int, ...]
    compile_s: float


def compile_alone(grammar: Grammar, text: str, workers: GrammarWorkers) -> CompiledGrammar:
    """Compile a grammar in a process of its own, twice if it ends the first; `text` replaces the grammar's own.

    Raises:
        GrammarKilled: It has ended both processes: it crashes, or exceeds their limits.
        GrammarBusy: A process was killed from outside.
        GrammarError: It cannot be used.
    """
    try:
        message = grammar.kind.value.encode() + b"\0" + text.encode()
    except UnicodeEncodeError:
        raise unusable("a string in it has half a character") from None
    requests = GrammarRequest(Op.ALLOWED, message), GrammarRequest(Op.FORCED, message)
    tokenizer = workers.tokenizer
    try:
        replies, seconds = workers.try_alone(*requests)
    except WorkerEnded as first:
        try:
            if not first.by_request:
                raise
            replies, seconds = workers.try_alone(*requests)
        except WorkerEnded as ended:
            raise _cause(ended, grammar) from None
    allowed, forced = (_content(reply) for reply in replies)
    return CompiledGrammar(
        grammar, message, workers, tokenizer, tokenizer.ids(allowed), _forced(forced, tokenizer), seconds
    )


class GrammarMatcher:
    """Position of a generation in its grammar. Callable on any thread, for one generation at a time.

    Every method takes all tokens of the generation, without the prompt; the result depends on these tokens only.
    `OutsideGrammar` means that the tokens are not allowed, another `GrammarError` that the grammar cannot continue or
    takes too long. A caller that is not `patient` never waits for long: `GrammarNotReady` means that it has to call
    `restore` where it can wait.
    """

    def __init__(self, compiled: CompiledGrammar, device: str = "") -> None:
        self._compiled = compiled
        self._owner = zlib.crc32(device.encode())
        self._number = next(_NUMBERS)
        self._ends = np.array(sorted(set(compiled.tokenizer.end_tokens)), dtype=np.int64)
        self._failure: GrammarError | None = None
        self._suspect: GrammarRequest | None = None

    @property
    def compile_s(self) -> float:
        return self._compiled.compile_s

    def allowed(self, text: Sequence[int], *, patient: bool = True) -> NDArray[np.int64]:
        """Return the ids that may follow: ascending, at least one. After an end token only end tokens may."""
        if self._ended(text):
            return self._ends
        found = self._compiled.first_allowed
        if len(text):
            found = self._compiled.tokenizer.ids(self._ask(Op.ALLOWED, text, patient=patient))
        if not len(found):
            raise GrammarError("No token of the vocabulary can continue the grammar here.")
        return found

    def forced(self, text: Sequence[int], *, patient: bool = True) -> tuple[int, ...]:
        """Return the ids that must follow, as far as they are known without a look at every token.

        Each is the only allowed one at its position; an end token is the last.
        """
        if self._ended(text):
            return ()
        if not len(text):
            return self._compiled.first_forced
        content = self._ask(Op.FORCED, text, patient=patient)
        if content[0] and len(self._ends) == 1:
            return (int(self._ends[0]),)
        return _forced(content, self._compiled.tokenizer)

    def check(self, text: Sequence[int]) -> None:
        """Check that the grammar allows the tokens, ended or not."""
        if not self._ended(text):
            self.allowed(text)
        elif text[-1] not in self.allowed(text[:-1]):
            raise OutsideGrammar("The text ends where its grammar does not allow it.")

    def restore(self, text: Sequence[int]) -> None:
        """Restore the state after these tokens in the worker. It may take seconds."""
        self._ask(Op.ALLOWED, text[:-1] if self._ended(text) else text, patient=True)

    def _ended(self, text: Sequence[int]) -> bool:
        return bool(len(text)) and text[-1] in self._ends

    def _ask(self, op: bytes, text: Sequence[int], *, patient: bool) -> bytes:
        """Send a request to the worker.

        A request that has ended a worker, or failed there, is tried in a process of its own before the next attempt,
        since another generation may be the cause.
        """
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        request = GrammarRequest(op, self._compiled.message, array("I", text).tobytes(), self._number, self._owner)
        if not patient:
            if self._suspect is not None:
                raise GrammarNotReady
            return self._ask_worker(request, patient=False)
        for _ in range(_TRIES):
            with suppress(GrammarNotReady, GrammarBusy):
                self._try_suspect()
                return self._ask_worker(request, patient=True)
        self._failure = GrammarError("The grammar's processes end again and again; try again later.")
        raise self._failure

    def _ask_worker(self, request: GrammarRequest, *, patient: bool) -> bytes:
        try:
            reply = self._compiled.workers.ask(request, patient=patient)
        except WorkerEnded:
            reply = Status.FAILED
        if reply[:1] == Status.FAILED:
            self._suspect = request  # or another one was the cause, or used up what generations share
            raise GrammarNotReady
        return _content(reply)

    def _try_suspect(self) -> None:
        """Try the request that may have ended a worker in a process of its own; raise GrammarError if it fails."""
        if (suspect := self._suspect) is None:
            return
        try:
            (reply,), _ = self._compiled.workers.try_alone(suspect)
            if reply[:1] == Status.FAILED:
                _content(reply)
        except (WorkerEnded, GrammarError) as error:
            failure = _cause(error, self._compiled.grammar) if isinstance(error, WorkerEnded) else error
            if not isinstance(failure, GrammarBusy):
                self._failure = failure
            raise failure from None
        self._suspect = None


def _content(reply: bytes) -> bytes:
    """Return the content of a reply; raise the error that it reports."""
    match reply[:1]:
        case Status.FAILED:
            raise unusable(reply[1:].decode("utf-8", "replace"))
        case Status.OUTSIDE:
            raise OutsideGrammar("The output has a token that its grammar does not allow.", taken=numbers_of(reply)[0])
        case Status.NOT_READY:
            raise GrammarNotReady
    return reply[1:]


def _forced(content: bytes, tokenizer: GrammarTokenizer) -> tuple[int, ...]:
    return tokenizer.known(np.frombuffer(content, dtype=np.uint32, offset=1).tolist())


def _cause(ended: WorkerEnded, grammar: Grammar) -> GrammarError:
    if ended.by_request:
        return GrammarKilled(grammar.digest, ended.how)
    return GrammarBusy("The process that compiled the grammar was killed; try again shortly.")
