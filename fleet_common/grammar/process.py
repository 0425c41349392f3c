"""Parent's side of the grammar worker: its process, its vocabulary, and the matchers of generations.

All native grammar code runs in the worker (see `worker`).
"""

import importlib.util
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from fleet_common.grammar.errors import (
    GrammarBanned,
    GrammarError,
    GrammarKilled,
    GrammarUnavailable,
    OutsideGrammar,
    unusable,
)
from fleet_common.grammar.worker import COMPILED, MAX_PACKET, OP, REPLY, Op, Status
from schemas.policy import Grammar

_BEFORE: Final = "\x02"
"""Prefix of a text that is encoded as if it were not at the beginning; it is a separate token."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GrammarTokenizer:
    """A vocabulary for the grammar worker.

    Attributes:
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
    def of_pieces(
        cls, pieces: Sequence[bytes], *, end_tokens: Sequence[int], encode: Callable[[str], Sequence[int]]
    ) -> "GrammarTokenizer":
        """Return the vocabulary of tokens given as bytes; raise GrammarUnavailable if it has no end token."""
        return cls(vocabulary=len(pieces), end_tokens=_require_ends(end_tokens), pieces=tuple(pieces), encode=encode)

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

        return cls(vocabulary=len(words), end_tokens=_require_ends(end_tokens), pieces=tuple(pieces), encode=encode)

    @classmethod
    def of_tokenizer_json(cls, text: str, *, vocabulary: int, end_tokens: Sequence[int]) -> "GrammarTokenizer":
        """Return the vocabulary of a `tokenizer.json`, with its size without padding."""
        return cls(vocabulary=vocabulary, end_tokens=_require_ends(end_tokens), file=text)


def _require_ends(end_tokens: Sequence[int]) -> tuple[int, ...]:
    if not end_tokens:
        raise GrammarUnavailable("A grammar needs an end token, and this model has none.")
    return tuple(end_tokens)


_PROGRAM: Final = "fleet_common.grammar.worker"

_START_S: Final = 60.0
_COMPILE_S: Final = 30.0
_STEP_S: Final = 10.0
"""Timeouts for the worker. They are long, since it limits its own processor time: a busy or suspended machine is not
the grammar's fault."""

_MOST_NEW: Final = 16_384
"""Tokens in one packet."""


def token_pieces(tokenizer: GrammarTokenizer) -> Sequence[bytes]:
    """Return the bytes of each token, none for end and control tokens; raise GrammarUnavailable."""
    if tokenizer.file is None:
        return tokenizer.pieces[: tokenizer.vocabulary]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, _start(tokenizer, theirs, "pieces", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        found = process.stdout.read()
        _await_start(ours)
        return [piece.encode("latin-1") for piece in json.loads(found)]


class GrammarProcess:
    """Parent of all grammar processes, which are forked from it. Callable on any thread.

    Raise GrammarUnavailable if llguidance is missing or does not support the tokenizer, or the process does not start.
    Building the vocabulary takes about a second.
    """

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = _start(tokenizer, theirs)
        self._end = weakref.finalize(self, _stop, self._control, process)
        try:
            _await_start(self._control)
        except GrammarUnavailable:
            self.close()
            raise

    def compile(self, grammar: Grammar, text: str, on_killed: Callable[[Grammar], object]) -> "CompiledGrammar":
        """Compile a grammar in its own process.

        `text` replaces the grammar's own; `on_killed` is called when the grammar has ended its process, now or later.

        Raises:
            GrammarKilled: It has crashed its process, or exceeded its limits.
            GrammarError: It cannot be used.
            OSError: This process has ended, or no other can be started; make another.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, self._lock:
                socket.send_fds(self._control, [b"f"], [theirs.fileno()])
            return CompiledGrammar(ours, self._tokenizer, grammar, text, on_killed)
        except BaseException:
            ours.close()
            raise

    def close(self) -> None:
        """End the process. Its compiled grammars stay usable."""
        self._end()


@dataclass(eq=False, slots=True, weakref_slot=True)
class CompiledGrammar:
    """A grammar in its own process, which ends with the last reference to this object. Callable on any thread."""

    _link: socket.socket
    _tokenizer: GrammarTokenizer
    grammar: Grammar
    _text: str
    _on_killed: Callable[[Grammar], object]
    first_allowed: NDArray[np.int64] = field(init=False)
    first_forced: tuple[int, ...] = field(init=False)
    compile_s: float = field(init=False)
    memory_kb: int = 0
    _failure: GrammarError | None = None
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    _dropped: deque[int] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        weakref.finalize(self, self._link.close)
        self._link.settimeout(_COMPILE_S)
        _receive(self._link)  # the process runs; if it ends from now on, the grammar is the cause
        try:
            request = self.grammar.kind.value.encode() + b"\0" + self._text.encode()
        except UnicodeEncodeError:
            raise unusable("a string in it has half a character") from None
        if len(request) > MAX_PACKET:
            raise unusable("it is too long")
        _, content = self._exchange(request, _COMPILE_S)
        self.compile_s, self.memory_kb, count = COMPILED.unpack_from(content)
        forced = np.frombuffer(content, dtype=np.uint32, count=count, offset=COMPILED.size)
        self.first_forced = self._known(forced.tolist())
        self.first_allowed = self._ids(content[COMPILED.size + forced.nbytes :])

    @property
    def usable(self) -> bool:
        return self._failure is None

    @property
    def vocabulary(self) -> int:
        return self._tokenizer.vocabulary

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return self._tokenizer.end_tokens

    def new_matcher(self) -> int:
        return next(self._numbers)

    def drop(self, matcher: int) -> None:
        """Forget a matcher. The garbage collector may call this, so the worker is notified later."""
        self._dropped.append(matcher)

    def allowed(self, matcher: int, keep: int, new: Sequence[int]) -> NDArray[np.int64]:
        """Return the ids that may follow; see `_move` for arguments and exceptions."""
        return self._ids(self._move(Op.ALLOWED, matcher, keep, new))

    def forced(self, matcher: int, keep: int, new: Sequence[int]) -> tuple[int, ...]:
        """Return the ids that must follow, as far as they are known without a look at every token."""
        content = self._move(Op.FORCED, matcher, keep, new)
        if content[0] and len(self.end_tokens) == 1:
            return self.end_tokens
        return self._known(np.frombuffer(content, dtype=np.uint32, offset=1).tolist())

    def _move(self, op: bytes, matcher: int, keep: int, new: Sequence[int]) -> bytes:
        """Move a matcher to the first `keep` tokens of its last sequence and the `new` ones; run an operation there.

        Raise OutsideGrammar for a token that is not allowed, another GrammarError if the grammar cannot continue.
        """
        while len(new) > _MOST_NEW:
            self._request(Op.CONSUME, matcher, keep, new[:_MOST_NEW])
            keep, new = keep + _MOST_NEW, new[_MOST_NEW:]
        return self._request(op, matcher, keep, new)

    def _request(self, op: bytes, matcher: int, keep: int, new: Sequence[int]) -> bytes:
        request = OP.pack(op, matcher, keep) + np.asarray(new, dtype=np.uint32).tobytes()
        taken, content = self._exchange(request, _STEP_S)
        if taken is not None:
            raise OutsideGrammar("The text has a token that its grammar does not allow.", taken=taken)
        return content

    def _exchange(self, request: bytes, wait_s: float) -> tuple[int | None, bytes]:
        """Return the answer to a request, and the number of tokens before one that is not allowed, if any."""
        with self._lock:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            try:
                reply = self._talk(request, wait_s)
            except TimeoutError:
                self._failure = GrammarError("The grammar's process does not answer; try again when fewer others run.")
            except OSError:
                self._failure = GrammarBanned()
                self._link.close()
                self._on_killed(self.grammar)
                raise GrammarKilled(self.grammar.digest) from None
            except Exception as error:  # noqa: BLE001 - of the vocabulary; the process waits for its answer
                self._failure = GrammarError(f"Text that the grammar forces cannot be encoded: {error}")
            if self._failure is not None:
                self._link.close()
                raise self._failure from None
        status, number = REPLY.unpack_from(reply)
        content = reply[REPLY.size :]
        if status == Status.FAILED:
            raise unusable(content.decode("utf-8", "replace"))
        if status == Status.OUTSIDE:
            return number, b""
        self.memory_kb = number
        return None, content

    def _talk(self, request: bytes, wait_s: float) -> bytes:
        """Send a request and return the reply; meanwhile encode text for the process."""
        self._link.settimeout(wait_s)
        while self._dropped:
            self._link.send(OP.pack(Op.DROP, self._dropped.popleft(), 0))
        self._link.send(request)
        while True:
            reply = _receive(self._link)
            if reply[:1] != Status.ENCODE:
                return reply
            text = reply[REPLY.size :].decode("utf-8", "replace")
            ids = np.asarray(self._tokenizer.encode_inside(text), dtype=np.uint32)
            self._link.send(Status.DONE + ids.tobytes())

    def _ids(self, mask: bytes) -> NDArray[np.int64]:
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        return np.flatnonzero(bits[: self.vocabulary])

    def _known(self, forced: Sequence[int]) -> tuple[int, ...]:
        return tuple(itertools.takewhile(lambda token: token < self.vocabulary, forced))


def _start(
    tokenizer: GrammarTokenizer, link: socket.socket, *arguments: str, stdout: int = subprocess.DEVNULL
) -> "subprocess.Popen[bytes]":
    if importlib.util.find_spec("llguidance") is None:
        raise GrammarUnavailable(
            "Grammars need the package llguidance, which is not installed; install it: pip install llguidance."
        )
    # The same modules as in this process, and none from the current folder (-P).
    places = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", _PROGRAM, str(link.fileno()), *arguments],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.DEVNULL,  # messages about hostile grammars do not belong in the log
        env=os.environ | {"PYTHONPATH": places, "MALLOC_ARENA_MAX": "1"},
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


_Found = TypeVar("_Found")


class GrammarMatcher:
    """Position of a generation in its grammar. Callable on any thread, for one generation at a time.

    Every method takes all tokens of the generation, without the prompt, and moves the matcher there: forwards, or back
    to the last common token. The result depends on these tokens only. `OutsideGrammar` means that the tokens are not
    allowed, `GrammarError` that the grammar cannot continue or takes too long.
    """

    def __init__(self, compiled: CompiledGrammar) -> None:
        self._compiled = compiled
        self._ends = np.array(sorted(set(compiled.end_tokens)), dtype=np.int64)
        self._number = compiled.new_matcher()
        self._tokens: list[int] = []  # accepted by the grammar's process
        self._allowed: NDArray[np.int64] | None = compiled.first_allowed  # after them
        self._moving = threading.Lock()
        weakref.finalize(self, compiled.drop, self._number)

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
                found = self._move(self._compiled.allowed, text)
                self._allowed = found
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
            return self._move(self._compiled.forced, text)

    def check(self, text: Sequence[int]) -> None:
        """Check that the grammar allows the tokens, ended or not."""
        if not self._ended(text):
            self.allowed(text)
        elif text[-1] not in self.allowed(text[:-1]):
            raise OutsideGrammar("The text ends where its grammar does not allow it.")

    def _ended(self, text: Sequence[int]) -> bool:
        return bool(len(text)) and text[-1] in self._ends

    def _move(self, ask: Callable[[int, int, Sequence[int]], _Found], text: Sequence[int]) -> _Found:
        """Move the grammar's process to a text, and return its answer."""
        own, keep = self._tokens, len(self._tokens)
        if list(text[:keep]) != own:
            keep = next(place for place, token in enumerate(own) if place >= len(text) or token != text[place])
        try:
            found = ask(self._number, keep, text[keep:])
        except GrammarError as error:
            # The process is at the start now, or before the forbidden token.
            self._tokens, self._allowed = list(text[: error.taken]) if isinstance(error, OutsideGrammar) else [], None
            raise
        if keep < len(own) or keep < len(text):
            self._tokens[keep:], self._allowed = text[keep:], None
        return found
