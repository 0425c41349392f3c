"""The parent's side of the grammar processes (see `worker`): it starts them, asks them, and ends those that hang."""

import contextlib
import importlib.util
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from fleet_common.grammar.errors import GrammarError, GrammarNotReady, GrammarUnavailable
from fleet_common.grammar.messages import Channel, GrammarRequest, Status, numbers_of
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.grammar.worker import LINKS, TRIAL, WORKER
from fleet_common.host import python_path

_PROGRAM: Final = "fleet_common.grammar.worker"

_START_S: Final = 60.0
_STOP_S: Final = 10.0

_COMPILE_S: Final = 5.0
_STEP_S: Final = 0.5
_TOKEN_S: Final = 0.0005
"""Processor time to compile a grammar, to answer, and to replay a token: 0.9 s, 0.04 s and 0.02 ms for 2,000 properties
on a slow core."""

_PATIENCE: Final = 20.0
"""Wall-clock time for each second of processor time: a busy or suspended machine is not the grammar's fault."""

_TRIALS: Final = 4
"""Trials at the same time."""

_EXTERNAL: Final = {-signal.SIGKILL, -signal.SIGTERM, 0}
"""Exit codes that no grammar causes: the kernel or an administrator ended the process."""


class WorkerEnded(OSError):  # noqa: N818
    """A process ended during a request; `code` is its exit code, negative for a signal, None if unknown."""

    def __init__(self, code: int | None = None) -> None:
        super().__init__("the process has ended")
        self.code = code

    @property
    def by_request(self) -> bool:
        """A request to this process is the cause, if there was no other."""
        return self.code is not None and self.code not in _EXTERNAL

    @property
    def how(self) -> str:
        code = self.code or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class _Link:
    """Our end of a socket of a process, for one request at a time; `used_s` returns the processor time for them."""

    def __init__(self, end: socket.socket, tokenizer: GrammarTokenizer, *, whole: bool) -> None:
        self._end = end
        self._channel = Channel(end)
        self._tokenizer = tokenizer
        end.settimeout(_START_S)
        self.pid, thread = numbers_of(self._channel.receive())
        self.used_s = partial(_used_by_process, self.pid) if whole else partial(_used_by_thread, self.pid, thread)

    def ask(self, request: bytes, limit_s: float) -> bytes:
        """Return the reply; raise WorkerEnded, or TimeoutError if the process does nothing."""
        until = time.monotonic() + _PATIENCE * limit_s
        used_s: float | None = None
        self._end.settimeout(limit_s / 2.0)
        with contextlib.suppress(BrokenPipeError):  # then the exit code can be read
            self._channel.write_frame(request)
        while True:
            try:
                reply = self._channel.receive()
            except TimeoutError:
                if time.monotonic() > until:
                    raise
                # It is measured only if it takes long; until then it has used no more than has passed.
                used_s = self.used_s() if used_s is None else used_s
                if self.used_s() - used_s > limit_s / 2.0:
                    raise WorkerEnded(-signal.SIGXCPU) from None
                continue
            if reply[:1] == Status.ENDED:
                raise WorkerEnded(numbers_of(reply)[0])
            if reply[:1] != Status.ENCODE:
                return reply
            ids = np.asarray(self._tokenizer.encode_inside(reply[1:].decode("utf-8", "replace")), dtype=np.uint32)
            self._channel.write_frame(ids.tobytes())


def _used_by_process(pid: int) -> float:
    return time.clock_gettime(~pid << 3 | 2)  # the clock that clock_getcpuclockid(3) returns


def _used_by_thread(pid: int, thread: int) -> float:
    fields = Path(f"/proc/{pid}/task/{thread}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    user, system = fields.split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class _Process:
    """A grammar process. Its first link is for requests that must not wait, and the others for those that may.

    Callable on any thread. It is killed when its first link is closed.
    """

    def __init__(self, ends: Sequence[socket.socket], tokenizer: GrammarTokenizer, *, whole: bool) -> None:
        self._ends = ends
        weakref.finalize(self, _close, ends)
        links = [_Link(end, tokenizer, whole=whole) for end in ends]
        self.pid, self.used_s = links[0].pid, links[0].used_s
        self._prompt, self._patient = _queue(links[:1]), _queue(links[1:] or links)
        self.ended = False

    def ask(self, request: GrammarRequest, limit_s: float, *, patient: bool) -> bytes:
        """Return the reply; the process may use `limit_s` of processor time.

        Raises:
            WorkerEnded: The process has ended, or was ended because it took too long.
            GrammarError: Text that the grammar forces cannot be encoded.
            GrammarNotReady: The process had ended before.
        """
        links = self._patient if patient else self._prompt
        link = links.get()
        if self.ended:
            links.put(link)
            raise GrammarNotReady
        try:
            return link.ask(request.encode(patient=patient), limit_s)
        except OSError as error:
            self.close()
            raise error if isinstance(error, WorkerEnded) else WorkerEnded from None
        except Exception as error:  # noqa: BLE001 - of the vocabulary; the process waits for its answer
            self.close()
            raise GrammarError(f"Text that the grammar forces cannot be encoded: {error}") from None
        finally:
            links.put(link)

    def close(self) -> None:
        self.ended = True
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # another thread may be reading


def _close(ends: Sequence[socket.socket]) -> None:
    for end in ends:
        end.close()


def _queue(links: Sequence[_Link]) -> "queue.SimpleQueue[_Link]":
    found: queue.SimpleQueue[_Link] = queue.SimpleQueue()
    for link in links:
        found.put(link)
    return found


class _Parent:
    """The process that has the vocabulary and forks the others; they end with it."""

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        self.tokenizer = tokenizer
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = _start(tokenizer, theirs)
        self.pid = process.pid
        self.close = weakref.finalize(self, _stop, self._control, process)
        try:
            _await_start(self._control)
        except GrammarUnavailable:
            self.close()
            raise

    def fork(self, kind: bytes) -> _Process:
        """Fork a process; raise OSError if this one has ended or cannot fork."""
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(LINKS[kind])]
        ours, theirs = [end for end, _ in pairs], [end for _, end in pairs]
        try:
            socket.send_fds(self._control, [kind], [end.fileno() for end in theirs])
        except OSError:
            _close(ours)
            raise
        finally:
            _close(theirs)
        return _Process(ours, self.tokenizer, whole=kind == TRIAL)


class GrammarWorkers:
    """The grammar processes of a vocabulary, which `load` returns. Callable on any thread.

    Building the vocabulary takes about a second, when the first grammar comes. Raise GrammarUnavailable if llguidance
    is missing or does not support the tokenizer, or no process starts.
    """

    def __init__(self, load: Callable[[], GrammarTokenizer]) -> None:
        self._load = load
        self._parent: _Parent | None = None
        self._worker: _Process | None = None
        self._lock = threading.RLock()
        self._trials = threading.BoundedSemaphore(_TRIALS)

    def ask(self, request: GrammarRequest, *, patient: bool) -> bytes:
        """Return the worker's reply. Only a `patient` caller starts the worker.

        Raise GrammarNotReady if it does not run, WorkerEnded if it ended meanwhile.
        """
        worker = self._worker
        if worker is None or worker.ended:
            if not patient:
                raise GrammarNotReady
            with self._lock:
                if self._worker is None or self._worker.ended:
                    self._worker = self._fork(WORKER)
                worker = self._worker
        return worker.ask(request, _limit_s(request) if patient else _STEP_S, patient=patient)

    def try_alone(self, *requests: GrammarRequest) -> tuple[list[bytes], float]:
        """Run requests about one grammar in a fresh process; return the replies, and its processor time (s).

        Raises WorkerEnded, with these requests as the cause if it says so.
        """
        with self._trials, contextlib.closing(self._fork(TRIAL)) as process:
            replies = [process.ask(each, _COMPILE_S + _limit_s(each), patient=True) for each in requests]
            try:
                return replies, process.used_s()
            except OSError:
                raise WorkerEnded from None

    @property
    def tokenizer(self) -> GrammarTokenizer:
        with self._lock:
            return self._running().tokenizer

    def close(self) -> None:
        """End all processes; another request starts them again."""
        with self._lock:
            if self._worker is not None:
                self._worker.close()
            if self._parent is not None:
                self._parent.close()
            self._parent = self._worker = None

    def _fork(self, kind: bytes) -> _Process:
        with self._lock:
            with contextlib.suppress(OSError):
                return self._running().fork(kind)
            self.close()
            try:
                return self._running().fork(kind)
            except OSError as error:
                raise GrammarUnavailable(f"The grammar worker does not answer: {error.strerror or error}.") from None

    def _running(self) -> _Parent:
        if self._parent is None:
            self._parent = _Parent(self._load())
        return self._parent


def _limit_s(request: GrammarRequest) -> float:
    return _STEP_S + _TOKEN_S * len(request.tokens) / 4


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
    control.close()  # it ends its children, then itself
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _await_start(control: socket.socket) -> None:
    """Wait until the vocabulary is built; raise GrammarUnavailable if it cannot."""
    control.settimeout(_START_S)
    try:
        answer = control.recv(1 << 12)
    except OSError:
        answer = b""
    if not answer:
        raise GrammarUnavailable("The grammar worker does not start; the machine may lack memory.")
    if answer[:1] != Status.DONE:
        reason = answer[1:].decode("utf-8", "replace")
        raise GrammarUnavailable(f"The tokenizer cannot be used for grammars: {reason.rstrip('.')}.")
