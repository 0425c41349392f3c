"""Grammar processes: the only program that runs llguidance, which a grammar can crash.

The parent (`workers`) starts it. It builds the vocabulary once, runs no grammar itself, and forks processes of two
kinds. The *worker* answers all requests; it keeps matchers of generations as a cache, and makes them again from a
request when it has lost them. A *trial* answers the requests about one grammar or one generation, and ends: if it
crashes, these requests are the cause.
"""

import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from fleet_common.grammar.messages import Channel, GrammarRequest, Op, Status, numbers
from fleet_common.host import give_back_free_memory, limit_memory

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from fleet_common.grammar.native import NativeVocabulary

WORKER: Final = b"w"
TRIAL: Final = b"t"

LINKS: Final = {WORKER: 5, TRIAL: 1}
"""Sockets of a process, each with a thread that answers one request at a time."""

_STACK_BYTES: Final = 8 << 20
_MEMORY_BYTES: Final = {WORKER: 512 << 20, TRIAL: 96 << 20}
"""Limit of a process, beyond what it shares with its parent. A schema of 2,000 properties takes 4 MB."""

_CACHE_KB: Final = 256 << 10
"""Memory of the worker above which the device with the largest part of it loses its matchers."""

_GRAMMARS: Final = 64
"""Grammars that the worker keeps compiled."""

_IDLE_S: Final = 10.0
_LOOK_S: Final = 2.0
"""Time after which a matcher is dropped, and how often the worker looks for such ones."""

_PIECE: Final = 256
"""Tokens that are replayed at once. A generation of that length takes some milliseconds."""

_COMPILE_NICE: Final = 10
"""Compiling gives way to the engine, whose threads wait for the slowest one."""

_BAD_FIRST: Final = 1000
"""If memory runs out, the kernel ends such a process first."""

_PAGE_KB: Final = resource.getpagesize() >> 10
_TOKEN_BYTES: Final = 4


def main() -> None:
    """Build the vocabulary from standard input, then fork a process for each packet of sockets received."""
    control = socket.socket(fileno=int(sys.argv[1]))
    # This process ends with its parent, not by a signal to the process group, which may come in the middle of work.
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        from fleet_common.grammar.native import NativeVocabulary  # noqa: PLC0415 - the parent imports this module too

        vocabulary = NativeVocabulary(json.load(sys.stdin))
    except Exception as error:  # noqa: BLE001 - whatever a foreign tokenizer raises
        control.send(Status.FAILED + str(error).encode("utf-8", "replace")[:1000])
        return
    control.send(Status.DONE)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _Children(control, vocabulary).serve()


class _Children:
    """Forks processes until the parent closes `control`, then ends all.

    Of each process the first socket is kept: when the parent closes it, the process is killed, whatever it computes,
    and when the process has ended, its exit code is sent there.
    """

    def __init__(self, control: socket.socket, vocabulary: "NativeVocabulary") -> None:
        self._control = control
        self._vocabulary = vocabulary
        self._links: dict[int, tuple[int, socket.socket]] = {}  # with the process, by the descriptor of that
        self._pids: dict[int, int] = {}  # by socket
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def serve(self) -> None:
        gc.freeze()  # keep pages shared with the children
        while True:
            ready = self._poll.poll()[0][0]  # one event at a time: handling it may close the descriptors of others
            if ready in self._links:
                self._report(ready)
            elif ready in self._pids:
                self._poll.unregister(ready)
                os.kill(self._pids.pop(ready), signal.SIGKILL)
            elif not self._fork():
                break
        for pid, _ in self._links.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _fork(self) -> bool:
        """Fork a process for the sockets that the parent sends; return False if it sends no more."""
        kind, descriptors, _, _ = socket.recv_fds(self._control, 1, max(LINKS.values()))
        if not descriptors:
            return False
        links = [socket.socket(fileno=each) for each in descriptors]
        try:
            pid = os.fork()
        except OSError:  # no memory, or too many processes: the parent gets no answer
            pid = None
        if pid == 0:
            for link in (self._control, *(link for _, link in self._links.values())):
                link.close()
            _run(kind, links, self._vocabulary)
        for link in links if pid is None else links[1:]:
            link.close()
        if pid is not None:
            descriptor = os.pidfd_open(pid)
            self._links[descriptor] = pid, links[0]
            self._poll.register(descriptor, select.POLLIN)
            self._pids[links[0].fileno()] = pid
            self._poll.register(links[0], 0)  # that the other end is closed is always reported
        return True

    def _report(self, descriptor: int) -> None:
        pid, link = self._links.pop(descriptor)
        self._poll.unregister(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        if self._pids.pop(link.fileno(), None) is not None:
            self._poll.unregister(link)
        with contextlib.suppress(OSError), link:
            link.settimeout(0.0)
            Channel(link).write_frame(numbers(Status.ENDED, os.waitstatus_to_exitcode(status)))


def _run(kind: bytes, links: list[socket.socket], vocabulary: "NativeVocabulary") -> NoReturn:
    try:
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(_BAD_FIRST), encoding="ascii")
        limit_memory(_MEMORY_BYTES[kind] + (len(links) + 1) * _STACK_BYTES)
        threading.stack_size(_STACK_BYTES)
        cache = MatcherCache(vocabulary, Memory().used_kb)
        for link in links:
            threading.Thread(target=_serve, args=(Channel(link), cache, vocabulary), daemon=True).start()
        while True:
            time.sleep(_LOOK_S)
            cache.drop_idle()
    finally:
        os._exit(1)


def _serve(channel: Channel, cache: "MatcherCache", vocabulary: "NativeVocabulary") -> None:
    """Answer the requests of one socket. Each exception ends the process, as a crash does."""
    code = 1
    try:
        vocabulary.encoder.set_caller(partial(_ask, channel))
        channel.write_frame(numbers(Status.DONE, os.getpid(), threading.get_native_id()))
        while True:
            request, patient = GrammarRequest.decode(channel.receive())
            channel.write_frame(cache.answer(request, patient=patient))
            if not cache.limit():
                code = 0  # no request is the cause; the parent starts another process
                break
    except OSError:
        code = 0  # the parent is gone
    finally:
        os._exit(code)


def _ask(channel: Channel, text: str) -> list[int]:
    channel.write_frame(Status.ENCODE + text.encode("utf-8", "replace"))
    return list(memoryview(channel.receive()).cast("I"))


class _Failed(Exception):  # noqa: N818
    """A grammar cannot be used or cannot continue."""


@dataclass(slots=True)
class Follower:
    """A matcher at the end of a generation's tokens; `beginning` is its grammar's at the start."""

    beginning: "LLMatcher"
    native: "LLMatcher"
    owner: int
    tokens: bytes = b""
    memory_kb: int = 0
    used_at: float = 0.0

    def rewind(self, tokens: bytes) -> None:
        """Go back to the last token that both have."""
        keep = _common(self.tokens, tokens)
        if keep < len(self.tokens):
            if not self.native.rollback((len(self.tokens) - keep) // _TOKEN_BYTES):
                self.native, keep = self.beginning.deep_copy(), 0
            self.tokens = tokens[:keep]

    def consume(self, tokens: bytes) -> bool:
        """Go on to the end of longer tokens; return False before the first that is not allowed."""
        place, taken = len(self.tokens), True
        while taken and place < len(tokens):
            piece = memoryview(tokens)[place : place + _PIECE * _TOKEN_BYTES].cast("I").tolist()
            number = self.native.try_consume_tokens(piece)
            place, taken = place + number * _TOKEN_BYTES, number == len(piece)
        self.tokens = tokens[:place]
        return taken


def _common(one: bytes, other: bytes) -> int:
    """Return the length of the whole tokens with which both begin (bytes)."""
    if other.startswith(one):
        return len(one)
    low, high = 0, min(len(one), len(other)) // _TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if one[: middle * _TOKEN_BYTES] == other[: middle * _TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low * _TOKEN_BYTES


class MatcherCache:
    """Compiled grammars and matchers of generations. Callable on any thread; a generation on one at a time."""

    def __init__(
        self,
        vocabulary: "NativeVocabulary",
        measure_kb: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._vocabulary = vocabulary
        self._measure_kb = measure_kb
        self._clock = clock
        self._used_kb = 0
        self._grammars: OrderedDict[bytes, LLMatcher] = OrderedDict()  # at the beginning
        self._followers: OrderedDict[int, Follower] = OrderedDict()  # by generation, the latest last
        self._lock = threading.Lock()

    def answer(self, request: GrammarRequest, *, patient: bool) -> bytes:
        with self._lock:
            follower = self._followers.pop(request.number, None)  # no other thread drops it meanwhile
            beginning = self._grammars.get(request.grammar)
            if beginning is not None:
                self._grammars.move_to_end(request.grammar)
        try:
            if beginning is None:
                if not patient:
                    return Status.NOT_READY
                beginning = self._compile(request.grammar)
            if follower is None or follower.beginning is not beginning:
                follower = Follower(beginning, beginning.deep_copy(), request.owner)
            follower.rewind(request.tokens)
            if patient or len(request.tokens) - len(follower.tokens) <= _PIECE * _TOKEN_BYTES:
                reply = self._advance(follower, request)
            else:
                reply = Status.NOT_READY
        except _Failed as error:
            self._forget(request.grammar)
            return Status.FAILED + str(error).encode("utf-8", "replace")[:2000]
        before_kb, self._used_kb = self._used_kb, self._measure_kb()
        follower.memory_kb += max(0, self._used_kb - before_kb)
        follower.used_at = self._clock()
        with self._lock:
            if self._grammars.get(request.grammar) is beginning:
                self._followers[request.number] = follower
        return reply

    def limit(self) -> bool:
        """Keep within the memory of this process: the device with the largest part loses its matchers.

        Return False if that does not suffice.
        """
        if self._used_kb <= _CACHE_KB:
            return True
        with self._lock:
            parts = Counter[int]()
            for each in self._followers.values():
                parts[each.owner] += each.memory_kb
            if parts:
                ((largest, _),) = parts.most_common(1)
                self._drop([number for number, each in self._followers.items() if each.owner == largest])
            used = {id(each.beginning) for each in self._followers.values()}
            for grammar in [name for name, each in self._grammars.items() if id(each) not in used]:
                del self._grammars[grammar]
        give_back_free_memory()
        self._used_kb = self._measure_kb()
        return self._used_kb <= _CACHE_KB

    def drop_idle(self) -> None:
        until = self._clock() - _IDLE_S
        with self._lock:
            idle = [number for number, each in self._followers.items() if each.used_at < until]
            self._drop(idle)
        if idle:
            give_back_free_memory()
            self._used_kb = self._measure_kb()

    def _drop(self, generations: list[int]) -> None:
        for number in generations:
            del self._followers[number]

    def _advance(self, follower: Follower, request: GrammarRequest) -> bytes:
        native, reply = follower.native, b""
        if not follower.consume(request.tokens):
            if not native.is_error() and (reason := _lexer_error(follower.beginning)):
                raise _Failed(reason)
            reply = numbers(Status.OUTSIDE, len(follower.tokens) // _TOKEN_BYTES)
        elif request.op == Op.ALLOWED:
            reply = Status.DONE + native.compute_bitmask()
        elif request.op == Op.FORCED:
            forced = native.compute_ff_tokens()
            ended = not forced and native.is_stopped()
            reply = Status.DONE + struct.pack(f"=?{len(forced)}I", ended, *forced)
        if native.is_error():
            raise _Failed(native.get_error())
        return reply

    def _compile(self, grammar: bytes) -> "LLMatcher":
        """Compile on a thread of lower priority; `_Failed` says why the grammar cannot be used."""
        kind, _, text = grammar.partition(b"\0")
        found: list[LLMatcher | str] = []
        ask = self._vocabulary.encoder.caller()

        def compile_() -> None:
            self._vocabulary.encoder.set_caller(ask)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _COMPILE_NICE)
            try:
                found.append(self._vocabulary.compile(kind.decode("ascii"), text.decode("utf-8")))
            except (ValueError, RecursionError, MemoryError) as error:
                found.append(str(error))

        thread = threading.Thread(target=compile_)
        thread.start()
        thread.join()
        made = found[0] if found else "the worker failed"
        if isinstance(made, str) or made.is_error():
            raise _Failed(made if isinstance(made, str) else made.get_error())
        with self._lock:
            self._grammars[grammar] = made
            old = list(self._grammars)[:-_GRAMMARS]
        for each in old:
            self._forget(each)
        return made

    def _forget(self, grammar: bytes) -> None:
        """Drop a grammar and its matchers, which share the lexer with its errors."""
        with self._lock:
            beginning = self._grammars.pop(grammar, None)
            self._drop([number for number, each in self._followers.items() if each.beginning is beginning])


def _lexer_error(beginning: "LLMatcher") -> str:
    """Return the error of the lexer that all matchers of a grammar share, if it has one.

    A lexer that has reached a limit takes no token, and reports it with the next mask only.
    """
    copy = beginning.deep_copy()
    copy.compute_bitmask()
    return copy.get_error()


class Memory:
    """Memory of this process beyond what it had at first."""

    def __init__(self) -> None:
        self._file = os.open("/proc/self/statm", os.O_RDONLY)
        self._before_kb = 0
        self._before_kb = self.used_kb()

    def used_kb(self) -> int:
        fields = os.pread(self._file, 100, 0).split()
        return max(0, (int(fields[1]) - int(fields[2])) * _PAGE_KB - self._before_kb)


if __name__ == "__main__":
    main()
