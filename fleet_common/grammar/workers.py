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

from fleet_common.grammar.errors import GrammarError, GrammarUnavailable
from fleet_common.grammar.messages import Channel, GrammarRequest, Status, numbers_of
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.grammar.worker import MAX_LINKS, TRIAL, WORKER
from fleet_common.host import python_path

_PROGRAM: Final = "fleet_common.grammar.worker"

_START_S: Final = 60.0
_STOP_S: Final = 10.0

_COMPILE_S: Final = 5.0
_STEP_S: Final = 0.5
_TOKEN_S: Final = 0.002
"""Processor time to compile a grammar, to answer, and to replay a token: 0.9 s, 0.04 s and 0.02 ms for 2,000 properties
on a slow core."""

_LONGEST_S: Final = 60.0
_LONGEST_STEP_S: Final = 10.0
"""Wall-clock limits of everything, and where a step waits. They are long: a busy or suspended machine is not the
grammar's fault."""

_TRIALS: Final = 4
"""Trials at the same time."""

_EXTERNAL: Final = {-signal.SIGKILL, -signal.SIGTERM, 0}
"""Exit codes that no grammar causes: the kernel or an administrator ended the process, or it had too much memory."""


class WorkerEnded(OSError):  # noqa: N818
    """A process has ended; `code` is its exit code, negative for a signal, None if unknown."""

    def __init__(self, code: int | None = None) -> None:
        super().__init__("the process has ended")
        self.code = code

    @property
    def by_request(self) -> bool:
        """A request that the process was answering is the cause."""
        return self.code is not None and self.code not in _EXTERNAL

    @property
    def how(self) -> str:
        code = self.code or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class WorkerLink:
    """Our end of a socket of a grammar process. Callable on any thread; closing it kills the process.

    `whole` measures the processor time of the whole process, not of the thread at the other end.
    """

    def __init__(self, end: socket.socket, tokenizer: GrammarTokenizer, *, whole: bool) -> None:
        self._channel = Channel(end)
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._ended = False
        self._close = weakref.finalize(self, end.close)
        end.settimeout(_LONGEST_S)
        self.pid, thread = numbers_of(self._channel.receive())
        self._used_s = partial(_used_by_process, self.pid) if whole else partial(_used_by_thread, self.pid, thread)

    def ask(self, request: bytes, limit_s: float, longest_s: float = _LONGEST_S) -> bytes:
        """Return the reply; the process may use `limit_s` of processor time.

        Raises:
            WorkerEnded: The process has ended, or was ended because it took too long.
            GrammarError: Text that the grammar forces cannot be encoded.
        """
        with self._lock:
            if self._ended:
                raise WorkerEnded
            try:
                return self._ask(request, limit_s, longest_s)
            except WorkerEnded:
                self.close()
                raise
            except OSError:
                self.close()
                raise WorkerEnded from None
            except Exception as error:  # noqa: BLE001 - of the vocabulary; the process waits for its answer
                self.close()
                raise GrammarError(f"Text that the grammar forces cannot be encoded: {error}") from None

    def close(self) -> None:
        self._ended = True
        self._close()

    def processor_s(self) -> float:
        """Return the processor time that was used so far; 0 if the system does not say."""
        try:
            return self._used_s()
        except (OSError, ValueError, IndexError):
            return 0.0

    def _ask(self, request: bytes, limit_s: float, longest_s: float) -> bytes:
        channel, end = self._channel, self._channel.socket
        until = time.monotonic() + longest_s
        used_s: float | None = None
        end.settimeout(_LONGEST_S)
        with contextlib.suppress(BrokenPipeError):  # then the exit code can be read
            channel.send(request)
        while True:
            end.settimeout(limit_s / 2.0)
            try:
                reply = channel.receive()
            except TimeoutError:
                if time.monotonic() > until:
                    raise
                # Until now it has used what has passed at most. It is measured only if it takes long.
                used_s = self.processor_s() if used_s is None else used_s
                if self.processor_s() - used_s > limit_s / 2.0:
                    raise WorkerEnded(-signal.SIGXCPU) from None
                continue
            if reply[:1] == Status.ENDED:
                raise WorkerEnded(numbers_of(reply)[0])
            if reply[:1] != Status.ENCODE:
                return reply
            ids = np.asarray(self._tokenizer.encode_inside(reply[1:].decode("utf-8", "replace")), dtype=np.uint32)
            end.settimeout(_LONGEST_S)
            channel.send(ids.tobytes())


def _used_by_process(pid: int) -> float:
    return time.clock_gettime(~pid << 3 | 2)  # the clock that clock_getcpuclockid(3) returns


def _used_by_thread(pid: int, thread: int) -> float:
    fields = Path(f"/proc/{pid}/task/{thread}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    user, system = fields.split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


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

    def fork(self, kind: bytes, links: int) -> list[WorkerLink]:
        """Return the links to a new process; raise OSError if this process has ended or cannot fork."""
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(links)]
        try:
            socket.send_fds(self._control, [kind], [theirs.fileno() for _, theirs in pairs])
            for _, theirs in pairs:
                theirs.close()
            return [WorkerLink(ours, self.tokenizer, whole=kind == TRIAL) for ours, _ in pairs]
        except BaseException:
            for each in (end for pair in pairs for end in pair):
                each.close()
            raise


class _Worker:
    """The process that answers all requests: one link for those that must not wait, others for those that may."""

    def __init__(self, links: Sequence[WorkerLink]) -> None:
        self._links = links
        self._free: queue.SimpleQueue[WorkerLink] = queue.SimpleQueue()
        for link in links[1:]:
            self._free.put(link)
        self.ended = False

    def ask(self, request: GrammarRequest, *, patient: bool) -> bytes:
        message = request.encode(patient=patient)
        link = self._free.get() if patient else self._links[0]
        try:
            return link.ask(message, _limit_s(request)) if patient else link.ask(message, _STEP_S, _LONGEST_STEP_S)
        except (WorkerEnded, GrammarError):
            self.ended = True
            raise
        finally:
            if patient:
                self._free.put(link)

    def close(self) -> None:
        for link in self._links:
            link.close()


class GrammarWorkers:
    """The grammar processes of a vocabulary, which `load` returns. Callable on any thread.

    Building the vocabulary takes about a second, when the first grammar comes. Raise GrammarUnavailable if llguidance
    is missing or does not support the tokenizer, or no process starts.
    """

    def __init__(self, load: Callable[[], GrammarTokenizer]) -> None:
        self._load = load
        self._parent: _Parent | None = None
        self._worker: _Worker | None = None
        self._lock = threading.Lock()
        self._trials = threading.BoundedSemaphore(_TRIALS)

    def ask(self, request: GrammarRequest, *, patient: bool) -> bytes:
        """Have the worker answer; raise WorkerEnded if it has ended. Only a `patient` caller has it started."""
        worker = self._worker
        if worker is None or worker.ended:
            if not patient:
                raise WorkerEnded
            worker = self._new_worker()
        return worker.ask(request, patient=patient)

    def try_alone(self, *requests: GrammarRequest) -> tuple[list[bytes], float]:
        """Have a fresh process answer requests about one grammar; return the replies, and its processor time (s).

        Raises WorkerEnded, with these requests as the cause if it says so.
        """
        with self._trials:
            (link,) = self._fork(TRIAL, 1)
            with contextlib.closing(link):
                replies = [link.ask(each.encode(patient=True), _COMPILE_S + _limit_s(each)) for each in requests]
                return replies, link.processor_s()

    @property
    def tokenizer(self) -> GrammarTokenizer:
        with self._lock:
            return self._running().tokenizer

    def close(self) -> None:
        """End all processes; another request starts them again."""
        with self._lock:
            self._discard()

    def _new_worker(self) -> _Worker:
        with self._lock:
            if self._worker is None or self._worker.ended:
                if self._worker is not None:
                    self._worker.close()
                self._worker = _Worker(self._fork_locked(WORKER, MAX_LINKS))
            return self._worker

    def _fork(self, kind: bytes, links: int) -> list[WorkerLink]:
        with self._lock:
            return self._fork_locked(kind, links)

    def _fork_locked(self, kind: bytes, links: int) -> list[WorkerLink]:
        with contextlib.suppress(OSError):
            return self._running().fork(kind, links)
        self._discard()
        try:
            return self._running().fork(kind, links)
        except OSError as error:
            raise GrammarUnavailable(f"The grammar worker does not answer: {error.strerror or error}.") from None

    def _running(self) -> _Parent:
        if self._parent is None:
            self._parent = _Parent(self._load())
        return self._parent

    def _discard(self) -> None:
        if self._worker is not None:
            self._worker.ended = True
            self._worker.close()
        if self._parent is not None:
            self._parent.close()
        self._parent = self._worker = None


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
