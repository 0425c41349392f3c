"""Parent's side of the grammar worker: its process, its vocabulary, and the matchers of generations.

All native grammar code runs in the worker (see `worker`).
"""

import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_common.grammar.errors import (
    GrammarBusy,
    GrammarError,
    GrammarKilled,
    GrammarLost,
    GrammarUnavailable,
    OutsideGrammar,
    unusable,
)
from fleet_common.grammar.worker import COMPILED, MAX_PACKET, OP, REPLY, Op, Status
from fleet_common.host import python_path
from schemas.policy import Grammar

_BEFORE: Final = "\x02"
"""Prefix of a text that is encoded as if it were not at the beginning; it is a separate token."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GrammarTokenizer:
    """A vocabulary for the grammar worker; raise GrammarUnavailable if it has no end token.

    Attributes:
        vocabulary: Number of tokens, without padding.
        pieces: UTF-8 bytes of each token, maybe half a character; none for control tokens. There may be further ones
            beyond the vocabulary, which no model has. Empty if `file` is given.
        encode: Returns the ids of a text, maybe with a token that begins every text. Unused if `file` is given.
        file: Content of a `tokenizer.json`.
    """

    vocabulary: int
    end_tokens: tuple[int, ...]
    pieces: tuple[bytes, ...] = ()
    encode: Callable[[str], Sequence[int]] = lambda _text: ()
    file: str | None = None

    def __post_init__(self) -> None:
        if not self.end_tokens:
            raise GrammarUnavailable("A grammar needs an end token, and this model has none.")

    def description(self) -> dict[str, Any]:
        if self.file is not None:
            return {"end_tokens": self.end_tokens, "file": self.file, "size": self.vocabulary}
        return {"end_tokens": self.end_tokens, "pieces": [piece.decode("latin-1") for piece in self.pieces]}

    def encode_inside(self, text: str) -> Sequence[int]:
        """Return the ids of a text that is not at the beginning."""
        before = list(self.encode(_BEFORE))
        found = list(self.encode(_BEFORE + text))
        return found[len(before) :] if found[: len(before)] == before else self.encode(text)

    @classmethod
    def of_words(cls, words: Sequence[str], *, end_tokens: Sequence[int]) -> "GrammarTokenizer":
        """Return the vocabulary of whole words, of which the longest match is always the right one."""
        own = [b"" if token in end_tokens else word.encode() for token, word in enumerate(words)]
        # Forced text may end inside a word: for llguidance every byte is a token, beyond the vocabulary.
        pieces = [*own, *(bytes([byte]) for byte in range(256))]
        ids = {piece: token for token, piece in reversed(list(enumerate(pieces))) if piece}
        longest = max(map(len, ids))

        def encode(text: str) -> list[int]:
            raw, place, found = text.encode(), 0, list[int]()
            while place < len(raw):
                lengths = range(min(longest, len(raw) - place), 0, -1)
                piece = next(raw[place : place + each] for each in lengths if raw[place : place + each] in ids)
                found.append(ids[piece])
                place += len(piece)
            return found

        return cls(vocabulary=len(words), end_tokens=tuple(end_tokens), pieces=tuple(pieces), encode=encode)


_PROGRAM: Final = "fleet_common.grammar.worker"

_START_S: Final = 60.0
_COMPILE_S: Final = 30.0
_STEP_S: Final = 10.0
"""Timeouts for the worker. They are long, since it limits its own processor time: a busy or suspended machine is not
the grammar's fault."""

_PIECE: Final = 256
"""Tokens in one request: others wait meanwhile. A generation of that length is replayed in some milliseconds."""

_GENERATIONS: Final = 32
"""Generations that one process follows, one after another or at the same time."""

_HEAVY_KB: Final = 1 << 10
"""Memory beyond which a generation gets a process for itself. A JSON object of 370 tokens takes 73 KB."""

_PROCESS_KB: Final = 2 << 10
"""Memory of a process of its own."""

_TRIES: Final = 4
"""Processes that may end below a generation before it is given up."""

_NUMBERS: Final = itertools.count()


class GrammarProcess:
    """Parent of all grammar processes, which are forked from it. Callable on any thread.

    Raise GrammarUnavailable if llguidance is missing or does not support the tokenizer, or the process does not start.
    Building the vocabulary takes about a second.
    """

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        self._tokenizer = tokenizer
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = _start(tokenizer, theirs)
        self._end = weakref.finalize(self, _stop, self._control, process)
        try:
            _await_start(self._control)
        except GrammarUnavailable:
            self.close()
            raise

    def compile(self, grammar: Grammar, text: str) -> "CompiledGrammar":
        """Compile a grammar in its own process; `text` replaces the grammar's own.

        Raises:
            GrammarKilled: It has crashed its process, or exceeded its limits.
            GrammarError: It cannot be used.
            OSError: This process has ended, or no other can be started; make another.
        """
        return CompiledGrammar(WorkerLink.fork(self._control, self._tokenizer), grammar, text)

    def close(self) -> None:
        """End the process. Its compiled grammars stay usable."""
        self._end()


_INNOCENT: Final = {-signal.SIGKILL, -signal.SIGALRM, -signal.SIGTERM, 0}
"""Exit codes that are not the grammar's fault: the kernel or an administrator killed it, or the machine was busy."""


class WorkerEnded(OSError):  # noqa: N818
    """A process has ended, or is `worn` out: every generation fails for the reason given.

    `code` is its exit code, negative for a signal, None if unknown.
    """

    def __init__(self, code: int | None = None, worn: GrammarError | None = None) -> None:
        super().__init__("the process has ended")
        self.code = code
        self.worn = worn

    @property
    def guilty(self) -> bool:
        """Whether a generation that the process followed alone is the reason."""
        return self.worn is not None or (self.code is not None and self.code not in _INNOCENT)

    def failure(self, grammar: Grammar) -> GrammarError:
        code = self.code or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return self.worn or GrammarKilled(grammar.digest, how)


@dataclass(eq=False, slots=True, weakref_slot=True)
class WorkerLink:
    """Our end of a grammar process, which ends when it is closed. Callable on any thread."""

    end: socket.socket
    tokenizer: GrammarTokenizer
    memory_kb: int = 0
    ended: WorkerEnded | None = None
    users: "weakref.WeakSet[GrammarMatcher]" = field(default_factory=weakref.WeakSet)
    _dropped: deque[int] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        weakref.finalize(self, self.end.close)

    @classmethod
    def fork(cls, parent: socket.socket, tokenizer: GrammarTokenizer) -> "WorkerLink":
        """Have a process forked; raise OSError if its parent has ended."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                socket.send_fds(parent, [b"f"], [theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        return cls(ours, tokenizer)

    @property
    def cost_kb(self) -> float:
        """Memory for each of its users."""
        return (self.memory_kb + _PROCESS_KB) / max(1, len(self.users))

    def drop(self, matcher: int) -> None:
        """Forget a matcher. The garbage collector may call this, so the process is notified later."""
        self._dropped.append(matcher)

    def exchange(self, request: bytes | None, wait_s: float) -> tuple[bytes, int, int, bytes]:
        """Send a request, and return the status, the two numbers and the content of the reply.

        Raise WorkerEnded if the process has ended, GrammarError if it reports one.
        """
        with self._lock:
            if self.ended is not None:
                raise WorkerEnded  # not by this request
            try:
                reply = self._reply(request, wait_s)
            except OSError as error:
                ended = error if isinstance(error, WorkerEnded) else WorkerEnded()
                self._close(ended)
                raise ended from None
            except Exception as error:  # noqa: BLE001 - of the vocabulary; the process waits for its answer
                self._close(WorkerEnded())
                raise GrammarError(f"Text that the grammar forces cannot be encoded: {error}") from None
            status, first, second = REPLY.unpack_from(reply)
            if status == Status.DONE:
                self.memory_kb = first
        if status == Status.FAILED:
            raise _failure(reply)
        return status, first, second, reply[REPLY.size :]

    def _close(self, ended: WorkerEnded) -> None:
        self.ended = ended
        self.end.close()

    def _reply(self, request: bytes | None, wait_s: float) -> bytes:
        self.end.settimeout(wait_s)
        try:
            reply = self._talk(request)
        except TimeoutError:
            raise
        except OSError:
            reply = _receive(self.end)  # how it has ended, if its parent has said so
        status, first, _ = REPLY.unpack_from(reply)
        if status == Status.ENDED:
            raise WorkerEnded(first)
        if status == Status.FAILED and first:
            raise WorkerEnded(worn=_failure(reply))
        return reply

    def _talk(self, request: bytes | None) -> bytes:
        """Send a request and return the reply; meanwhile encode text for the process."""
        while self._dropped:
            self.end.send(OP.pack(Op.DROP, self._dropped.popleft(), 0))
        if request is not None:
            self.end.send(request)
        while (reply := _receive(self.end))[:1] == Status.ENCODE:
            text = reply[REPLY.size :].decode("utf-8", "replace")
            ids = np.asarray(self.tokenizer.encode_inside(text), dtype=np.uint32)
            self.end.send(Status.DONE + ids.tobytes())
        return reply


def _failure(reply: bytes) -> GrammarError:
    return unusable(reply[REPLY.size :].decode("utf-8", "replace"))


@dataclass(eq=False, slots=True, weakref_slot=True)
class CompiledGrammar:
    """A compiled grammar, in a process that ends with the last reference to this object. Callable on any thread.

    This process follows no generation: it forks those that do.
    """

    link: WorkerLink
    grammar: Grammar
    _text: InitVar[str]
    first_allowed: NDArray[np.int64] = field(init=False)
    first_forced: tuple[int, ...] = field(init=False)
    compile_s: float = field(init=False)
    _shared: WorkerLink | None = None
    _begun: int = 0
    _followers: "weakref.WeakSet[WorkerLink]" = field(default_factory=weakref.WeakSet)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self, _text: str) -> None:
        self.link.exchange(None, _COMPILE_S)  # the process runs; if it ends from now on, the grammar is the cause
        try:
            request = self.grammar.kind.value.encode() + b"\0" + _text.encode()
        except UnicodeEncodeError:
            raise unusable("a string in it has half a character") from None
        if len(request) > MAX_PACKET:
            raise unusable("it is too long")
        try:
            *_, content = self.link.exchange(request, _COMPILE_S)
        except WorkerEnded as ended:
            if ended.code is None:
                raise
            if ended.guilty:
                raise ended.failure(self.grammar) from None
            raise GrammarBusy("The process that compiled the grammar was killed; try again shortly.") from None
        self.compile_s, count = COMPILED.unpack_from(content)
        forced = np.frombuffer(content, dtype=np.uint32, count=count, offset=COMPILED.size)
        self.first_forced = self.known(forced.tolist())
        self.first_allowed = self.ids(content[COMPILED.size + forced.nbytes :])

    @property
    def tokenizer(self) -> GrammarTokenizer:
        return self.link.tokenizer

    @property
    def usable(self) -> bool:
        return self.link.ended is None

    @property
    def memory_kb(self) -> int:
        """Memory of its process, and of those that follow generations."""
        with self._lock:
            return sum(link.memory_kb + _PROCESS_KB for link in (self.link, *self._followers))

    def follower(self, *, alone: bool) -> WorkerLink:
        """Return a process for one more generation, which is the only one if `alone`; raise OSError if there is none.

        What a process has accumulated over many generations may end it, so it is replaced in time.
        """
        with self._lock:
            if not alone and self._shared is not None and self._shared.ended is None and self._begun < _GENERATIONS:
                self._begun += 1
                return self._shared
            try:
                found = WorkerLink.fork(self.link.end, self.tokenizer)
            except OSError:
                self.link.ended = WorkerEnded()
                raise
            self._followers.add(found)
            if not alone:
                self._shared, self._begun = found, 1
            return found

    def retire(self, link: WorkerLink) -> None:
        """Let a process begin no more generations."""
        with self._lock:
            if self._shared is link:
                self._shared = None

    def ids(self, mask: bytes) -> NDArray[np.int64]:
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        return np.flatnonzero(bits[: self.tokenizer.vocabulary])

    def known(self, forced: Sequence[int]) -> tuple[int, ...]:
        return tuple(itertools.takewhile(lambda token: token < self.tokenizer.vocabulary, forced))


def _start(tokenizer: GrammarTokenizer, link: socket.socket) -> "subprocess.Popen[bytes]":
    if importlib.util.find_spec("llguidance") is None:
        raise GrammarUnavailable(
            "Grammars need the package llguidance, which is not installed; install it: pip install llguidance."
        )
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", _PROGRAM, str(link.fileno())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # messages about hostile grammars do not belong in the log
        env=os.environ | {"PYTHONPATH": python_path(), "MALLOC_ARENA_MAX": "1"},
        pass_fds=[link.fileno()],
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        with process.stdin:
            process.stdin.write(json.dumps(tokenizer.description()).encode())
    except OSError:
        pass  # it has ended; its reader gets no answer
    return process


def _stop(control: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    control.close()
    process.kill()
    process.wait()


def _receive(link: socket.socket) -> bytes:
    """Return the next packet; raise OSError if the other end is gone or silent for too long."""
    packet = link.recv(MAX_PACKET)
    if not packet:
        raise ConnectionResetError
    return packet


def _await_start(control: socket.socket) -> None:
    """Wait until the worker has built the vocabulary; raise GrammarUnavailable if it cannot."""
    control.settimeout(_START_S)
    try:
        answer = _receive(control)
    except OSError:
        raise GrammarUnavailable("The grammar worker does not start; the machine may lack memory.") from None
    if answer[:1] != Status.DONE:
        reason = answer[1:].decode("utf-8", "replace")
        raise GrammarUnavailable(f"The tokenizer cannot be used for grammars: {reason.rstrip('.')}.")


class GrammarMatcher:
    """Position of a generation in its grammar. Callable on any thread, for one generation at a time.

    Every method takes all tokens of the generation, without the prompt, and moves the matcher there: forwards, or back
    to the last common token. The result depends on these tokens only. `OutsideGrammar` means that the tokens are not
    allowed, `GrammarLost` that `restore` must be called first, another `GrammarError` that the grammar cannot continue
    or takes too long.

    `compile_again` replaces the compiled grammar if its process has ended. `check_memory` raises GrammarError if the
    generation may not take any more.
    """

    def __init__(
        self,
        compiled: CompiledGrammar,
        compile_again: Callable[[], CompiledGrammar],
        check_memory: Callable[[], None] = lambda: None,
    ) -> None:
        self._compiled = compiled
        self._compile_again = compile_again
        self._check_memory = check_memory
        self._ends = np.array(sorted(set(self._compiled.tokenizer.end_tokens)), dtype=np.int64)
        self._link: WorkerLink | None = None
        self._number = next(_NUMBERS)
        self._leave: Callable[[], object] = lambda: None
        self._alone = False
        self._failure: GrammarError | None = None
        self._tokens: list[int] = []  # accepted by the process
        self._allowed: NDArray[np.int64] | None = None  # after them
        self._moving = threading.Lock()
        self._compiled.link.users.add(self)

    @property
    def cost_kb(self) -> float:
        """Its part of the memory of the processes that it uses."""
        return sum(link.cost_kb for link in (self._link, self._compiled.link) if link is not None)

    @property
    def compile_s(self) -> float:
        return self._compiled.compile_s

    def allowed(self, text: Sequence[int]) -> NDArray[np.int64]:
        """Return the ids that may follow: ascending, at least one. After an end token only end tokens may."""
        with self._moving:
            if self._ended(text):
                return self._ends
            if not len(text):
                found = self._compiled.first_allowed
            elif self._allowed is not None and list(text) == self._tokens:
                found = self._allowed
            else:
                found = self._allowed = self._compiled.ids(self._move(Op.ALLOWED, text))
            if not len(found):
                raise GrammarError("No token of the vocabulary can continue the grammar here.")
            return found

    def forced(self, text: Sequence[int]) -> tuple[int, ...]:
        """Return the ids that must follow, as far as they are known without a look at every token.

        Each is the only allowed one at its position; an end token is the last.
        """
        with self._moving:
            if self._ended(text):
                return ()
            if not len(text):
                return self._compiled.first_forced
            content = self._move(Op.FORCED, text)
            if content[0] and len(self._ends) == 1:
                return (int(self._ends[0]),)
            return self._compiled.known(np.frombuffer(content, dtype=np.uint32, offset=1).tolist())

    def check(self, text: Sequence[int]) -> None:
        """Check that the grammar allows the tokens, ended or not."""
        if not self._ended(text):
            self.allowed(text)
        elif text[-1] not in self.allowed(text[:-1]):
            raise OutsideGrammar("The text ends where its grammar does not allow it.")

    def restore(self, text: Sequence[int]) -> None:
        """Follow the tokens in another process, alone if need be. It may take seconds.

        Raise GrammarKilled if the generation ends a process that it has for itself, GrammarError if it cannot go on.
        """
        text = text[:-1] if self._ended(text) else text
        with self._moving:
            for _ in range(_TRIES):
                try:
                    if not self._compiled.usable:
                        self._compiled = self._compile_again()
                    self._use(self._compiled.follower(alone=self._alone))
                    self._move(Op.CONSUME, text)
                except (GrammarLost, OSError):
                    continue
                except OutsideGrammar:
                    raise
                except GrammarError as error:
                    self._failure = error
                    raise
                if self._link is not None:
                    return
            self._failure = GrammarError("The grammar's processes end again and again; try again later.")
            raise self._failure

    def _use(self, link: WorkerLink | None) -> None:
        """Change to another process, which has not seen this generation."""
        if self._link is not None:
            self._link.users.discard(self)
        self._leave()
        self._link, self._tokens, self._allowed = link, [], None
        if link is not None:
            link.users.add(self)
            self._compiled.link.users.add(self)
            self._leave = weakref.finalize(self, link.drop, self._number)

    def _ended(self, text: Sequence[int]) -> bool:
        return bool(len(text)) and text[-1] in self._ends

    def _move(self, op: bytes, text: Sequence[int]) -> bytes:
        """Move to a text, a piece after another, and return the answer there."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        if self._link is None:
            if len(text) > _PIECE or self._alone:
                raise GrammarLost
            try:
                self._use(self._compiled.follower(alone=False))
            except OSError:
                raise GrammarLost from None
        keep = len(self._tokens)
        if list(text[:keep]) != self._tokens:
            pairs = zip(self._tokens, text, strict=False)
            keep = next((place for place, (own, token) in enumerate(pairs) if own != token), min(keep, len(text)))
        while len(text) - keep > _PIECE:
            self._request(Op.CONSUME, keep, text[keep : keep + _PIECE])
            keep += _PIECE
        return self._request(op, keep, text[keep:])

    def _request(self, op: bytes, keep: int, new: Sequence[int]) -> bytes:
        link = self._link
        if link is None:
            raise GrammarLost
        request = OP.pack(op, self._number, keep) + np.asarray(new, dtype=np.uint32).tobytes()
        try:
            status, number, own_kb, content = link.exchange(request, _STEP_S)
        except WorkerEnded as ended:
            if ended.guilty and self._alone:
                self._failure = ended.failure(self._compiled.grammar)
            self._lose(alone=ended.guilty)
            raise self._failure or GrammarLost from None
        except GrammarError as error:
            self._failure = error
            raise
        if keep < len(self._tokens) or len(new):
            self._tokens[keep:], self._allowed = new, None
        if status == Status.OUTSIDE:
            del self._tokens[number:]
            raise OutsideGrammar("The text has a token that its grammar does not allow.", taken=number)
        if self._alone:
            self._check_memory()
        elif own_kb > _HEAVY_KB:
            self._lose(alone=True)
            self._compiled.retire(link)
        return content

    def _lose(self, *, alone: bool) -> None:
        """Leave the process; the next is for this generation only if `alone`."""
        self._use(None)
        self._alone = self._alone or alone
