"""Grammar process: the parent's side of the grammar worker, in which all native grammar code runs (see `worker`)."""

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
from typing import Final

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
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.grammar.worker import COMPILED, MAX_PACKET, OP, REPLY, Op, Status
from schemas.grammar import Grammar

_PROGRAM: Final = "fleet_common.grammar.worker"

_START_S: Final = 60.0
_COMPILE_S: Final = 30.0
_STEP_S: Final = 10.0
"""Longest waits for the worker. They are long, since it limits itself by processor time: a machine that is busy or
asleep is not the grammar's fault."""

_MOST_NEW: Final = 16_384
"""Tokens in one packet."""


def token_pieces(tokenizer: GrammarTokenizer) -> Sequence[bytes]:
    """Return the bytes of each token; none for those that end a generation or control it.

    Raises:
        GrammarUnavailable: The worker cannot be started, or does not know such a tokenizer.
    """
    if tokenizer.file is None:
        return tokenizer.pieces[: tokenizer.vocabulary]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, _start(tokenizer, theirs, "pieces", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        found = process.stdout.read()
        _await_start(ours)
        return [piece.encode("latin-1") for piece in json.loads(found)]


class GrammarProcess:
    """The process that the processes of grammars are forked from. Callable on any thread.

    Args:
        tokenizer: The vocabulary.

    Raises:
        GrammarUnavailable: llguidance is not installed, or does not know such a tokenizer, or the process does not
            start. Building the vocabulary takes about a second.
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
        """Compile a grammar in a process of its own.

        Args:
            grammar: The grammar.
            text: What the worker is given in place of its text.
            on_killed: Called when it has ended its process, now or later.

        Raises:
            GrammarKilled: It has crashed its process, or taken more than that may.
            GrammarError: It cannot be used.
            OSError: This process has ended, or the machine can start no other; make another.
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
        """End it. The grammars that it has compiled can be used further."""
        self._end()


@dataclass(eq=False, slots=True, weakref_slot=True)
class CompiledGrammar:
    """A grammar in a process of its own, which ends when nobody refers to this any more. Callable on any thread.

    Attributes:
        grammar: What it is.
        first_allowed: Ids that may begin a generation.
        first_forced: Ids that must.
        compile_s: Processor time that it took to compile.
        memory_kb: What it takes.
    """

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
        _receive(self._link)  # its process runs, and what ends it from now on is the grammar
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
        """Return the number of a further matcher, at the beginning."""
        return next(self._numbers)

    def drop(self, matcher: int) -> None:
        """Forget a matcher. It may be called by the garbage collector, so the worker is told later."""
        self._dropped.append(matcher)

    def allowed(self, matcher: int, keep: int, new: Sequence[int]) -> NDArray[np.int64]:
        """Return the ids that may follow a text; see `_move` for the arguments and exceptions."""
        return self._ids(self._move(Op.ALLOWED, matcher, keep, new))

    def forced(self, matcher: int, keep: int, new: Sequence[int]) -> tuple[int, ...]:
        """Return the ids that must follow a text, as far as is found out without looking at every token."""
        content = self._move(Op.FORCED, matcher, keep, new)
        if content[0] and len(self.end_tokens) == 1:
            return self.end_tokens
        return self._known(np.frombuffer(content, dtype=np.uint32, offset=1).tolist())

    def _move(self, op: bytes, matcher: int, keep: int, new: Sequence[int]) -> bytes:
        """Move a matcher to the text that an operation is about.

        Args:
            op: The operation.
            matcher: Its number.
            keep: Tokens of its last text that are this one's too.
            new: Those that follow.

        Raises:
            OutsideGrammar: The grammar rules a token out.
            GrammarKilled: The grammar has crashed its process, or taken more than that may.
            GrammarError: The grammar cannot go on; the matcher is at the beginning again.
        """
        while len(new) > _MOST_NEW:
            self._request(Op.CONSUME, matcher, keep, new[:_MOST_NEW])
            keep, new = keep + _MOST_NEW, new[_MOST_NEW:]
        return self._request(op, matcher, keep, new)

    def _request(self, op: bytes, matcher: int, keep: int, new: Sequence[int]) -> bytes:
        request = OP.pack(op, matcher, keep) + np.asarray(new, dtype=np.uint32).tobytes()
        taken, content = self._exchange(request, _STEP_S)
        if taken is not None:
            raise OutsideGrammar("The text holds a token that its grammar rules out.", taken=taken)
        return content

    def _exchange(self, request: bytes, wait_s: float) -> tuple[int | None, bytes]:
        """Return what follows on a request; a number if a token was ruled out: that of the tokens before it."""
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
            except Exception as error:  # noqa: BLE001 - whatever the vocabulary raises, the process waits for its answer
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
        """Send a request and return the reply; encode meanwhile what the process asks for."""
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
    # The same modules as this process has, wherever it has them from, and none from a folder that it happens to be in.
    places = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", _PROGRAM, str(link.fileno()), *arguments],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.DEVNULL,  # what native code says of a hostile grammar is for nobody's log
        env=os.environ | {"PYTHONPATH": places, "MALLOC_ARENA_MAX": "1"},
        pass_fds=[link.fileno()],
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        with process.stdin:
            process.stdin.write(json.dumps(tokenizer.description()).encode())
    except OSError:
        pass  # it has ended; whoever reads its answer finds none
    return process


def _stop(control: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    control.close()
    process.kill()
    process.wait()


def _receive(link: socket.socket) -> bytes:
    """Return the next packet.

    Raises:
        OSError: The other end is gone, or silent for too long.
    """
    packet = link.recv(MAX_PACKET)
    if not packet:
        raise ConnectionResetError
    return packet


def _await_start(control: socket.socket) -> None:
    """Wait until the worker has built the vocabulary.

    Raises:
        GrammarUnavailable: It cannot.
    """
    control.settimeout(_START_S)
    try:
        answer = _receive(control)
    except OSError:
        raise GrammarUnavailable("The grammar worker does not start; the machine may lack memory.") from None
    if answer[:1] != Status.DONE:
        reason = answer[1:].decode("utf-8", "replace")
        raise GrammarUnavailable(f"The tokenizer cannot be used for grammars: {reason.rstrip('.')}.")
