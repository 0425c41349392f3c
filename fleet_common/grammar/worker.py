"""Grammar worker: the only program that runs llguidance, which a grammar can crash.

`GrammarProcess` starts it. It builds the vocabulary once, and forks a process for each grammar. That one compiles the
grammar, and forks processes that follow generations. The compiled grammar thus stays as it was, whatever the
generations do, and a process that ends can be replaced in milliseconds.

Every message is one packet. The parent sends a request and reads the reply; in between, the child may ask the parent to
encode forced text. When a process has ended, the one that forked it sends the last packet in its place.
"""

import contextlib
import functools
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from fleet_common.host import limit_memory

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from llguidance._lib import JsonCompileOptions

MAX_PACKET: Final = 1 << 17
"""Bytes: more than the largest grammar or mask, and less than a socket's buffer."""

OP: Final = struct.Struct("=cII")
"""Request: operation, number of the matcher, and number of its tokens to keep; new tokens follow."""

REPLY: Final = struct.Struct("=cii")
"""Reply: status, and two numbers (see `Status`)."""

COMPILED: Final = struct.Struct("=dI")
"""After the reply to a grammar: processor time in seconds, and the number of forced tokens."""


class Op:
    ALLOWED: Final = b"a"
    FORCED: Final = b"f"
    CONSUME: Final = b"c"
    DROP: Final = b"d"


class Status:
    """Result of a request.

    `DONE` carries the memory in kilobytes of the process and of the matcher, `OUTSIDE` the number of tokens before the
    forbidden one, `FAILED` the reason and whether all other generations fail as well, `ENCODE` text to encode, `ENDED`
    the exit code, negative for a signal.
    """

    DONE: Final = b"="
    OUTSIDE: Final = b"?"
    FAILED: Final = b"!"
    ENCODE: Final = b"e"
    ENDED: Final = b"x"


_STACK_BYTES: Final = 8 << 20
_MEMORY_BYTES: Final = 96 << 20
"""Limit per process, beyond what it shares with its parent. A schema of 2,000 properties takes 4 MB."""

_COMPILE_S: Final = 5.0
_STEP_S: Final = 0.5
"""Processor time for compiling and for a request: 0.9 s and 0.04 s for 2,000 properties on a slow core."""

_LONGEST_S: Final = 60.0
"""Wall-clock limit of everything, so that a hanging process ends. The parent has timed out by then."""

_COMPILE_NICE: Final = 10
"""Compiling gives way to the engine, whose threads wait for the slowest one."""

_BAD_FIRST: Final = 1000
"""If memory runs out, the kernel ends this process first."""

_WINDOW: Final = 512
"""Characters of forced text that are encoded at once. A string constant may have tens of thousands, of which a step
needs few tokens."""

_PAGE_KB: Final = resource.getpagesize() >> 10

_UNSURE: Final = 4
"""Last tokens of a truncated window, which are dropped: the text after it might change them."""

_JSON: "Final[JsonCompileOptions]" = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "lenient": False,
    "coerce_one_of": False,
}
"""A single, common way to write values, so that most of the text around them is forced."""


def main() -> None:
    """Build the vocabulary from standard input, then fork a process for each socket received."""
    control = socket.socket(fileno=int(sys.argv[1]))
    # This process ends with its parent, not by a signal to the process group, which may come in the middle of work.
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, hard))
    try:
        vocabulary = NativeVocabulary(json.load(sys.stdin))
    except Exception as error:  # noqa: BLE001 - whatever a foreign tokenizer raises
        control.send(Status.FAILED + str(error).encode("utf-8", "replace")[:1000])
        return
    control.send(Status.DONE)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _fork_for_each(control, lambda link: _compile(link, vocabulary))


def _fork_for_each(control: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    """Fork a process for each socket received until the other end closes; report on it how the process has ended."""
    gc.freeze()  # keep pages shared with the children
    children = dict[int, tuple[int, socket.socket]]()  # by descriptor of the process
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready in children:
                poll.unregister(ready)
                pid, link = children.pop(ready)
                os.close(ready)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError), link:
                    link.send(REPLY.pack(Status.ENDED, os.waitstatus_to_exitcode(status), 0), socket.MSG_DONTWAIT)
                continue
            _, sockets, _, _ = socket.recv_fds(control, 1, 1)
            if not sockets:
                return
            link = socket.socket(fileno=sockets[0])
            try:
                pid = os.fork()
            except OSError:
                link.close()  # no memory, or too many processes: the parent gets no answer
                continue
            if pid == 0:
                for other in (control, *(link for _, link in children.values())):
                    other.close()
                _run(serve, link)
            descriptor = os.pidfd_open(pid)
            children[descriptor] = pid, link
            poll.register(descriptor, select.POLLIN)


def _run(serve: Callable[[socket.socket], None], link: socket.socket) -> NoReturn:
    code = 1
    try:
        serve(link)
        code = 0
    finally:
        os._exit(code)


class NativeVocabulary:
    """The tokens, for llguidance.

    `description` has `end_tokens`, and either `pieces` (bytes as Latin-1) or `file`, the content of a `tokenizer.json`,
    with the number of tokens `size`. `encoder` encodes forced text.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        import llguidance  # noqa: PLC0415 - this module is imported for its constants too

        ends: list[int] = description["end_tokens"]
        file, native = description.get("file"), None
        if file is None:
            pieces = [piece.encode("latin-1") for piece in description["pieces"]]
        else:
            native = llguidance.LLTokenizer(file, n_vocab=description["size"], eos_token=ends, slices=[])
            pieces = pieces_of(native, ends)
        self.encoder = Encoder(pieces, ends[0], native)
        wrapper = llguidance.TokenizerWrapper(self.encoder)
        self.native: LLTokenizer = llguidance.LLTokenizer(wrapper, n_vocab=len(pieces), eos_token=ends)

    def compile(self, kind: str, text: str) -> "LLMatcher":
        """Return a grammar at its start, or with its error."""
        import llguidance  # noqa: PLC0415

        return llguidance.LLMatcher(self.native, _source(kind, text), log_level=0, limits=_limits())


def pieces_of(native: "LLTokenizer", ends: Sequence[int]) -> list[bytes]:
    silent = set(ends)
    return [
        b"" if token in silent or native.is_special_token(token) else bytes(native.decode_bytes([token]))
        for token in range(native.vocab_size)
    ]


class Encoder:
    """Tokenizer for llguidance; `native` encodes, else `ask` has the parent do it."""

    def __init__(self, pieces: list[bytes], end: int, native: "LLTokenizer | None") -> None:
        self.tokens = pieces
        self.eos_token_id = end
        self.bos_token_id = None
        self.special_token_ids: list[int] = []
        self.ask: Callable[[str], list[int]] = lambda _text: []
        self._native = native
        # Enough tokens are left after the cut even if all are the longest.
        self._window = max(_WINDOW, 4 * _UNSURE * max(map(len, pieces)))
        self._encode = functools.lru_cache(maxsize=256)(self._encode_window)

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the tokens at the beginning of a text: all of them if it is short."""
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        found = self._encode(plain[: self._window])
        return found if len(plain) <= self._window else found[:-_UNSURE]

    def _encode_window(self, text: str) -> list[int]:
        return self.ask(text) if self._native is None else self._native.tokenize_str(text)


def _compile(link: socket.socket, vocabulary: NativeVocabulary) -> None:
    """Compile the grammar that comes first, then fork a process for each group of generations."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_BAD_FIRST), encoding="ascii")
    limit_memory(_MEMORY_BYTES + _STACK_BYTES)
    memory = Memory()
    vocabulary.encoder.ask = functools.partial(_ask, link)
    link.send(REPLY.pack(Status.DONE, 0, 0))
    kind, _, text = link.recv(MAX_PACKET).partition(b"\0")
    found: list[LLMatcher] = []
    replies: list[bytes] = []

    def compile_() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _COMPILE_NICE)
        try:
            found.append(vocabulary.compile(kind.decode("ascii"), text.decode("utf-8")))
            replies.append(_beginning(found[0].deep_copy(), memory))
        except (ValueError, RecursionError, MemoryError) as error:
            replies.append(_failed(str(error)))

    _limit_time(_COMPILE_S)
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=compile_)
    thread.start()
    thread.join()
    _limit_time(0.0)
    reply = replies[0] if replies else _failed("the worker failed")
    link.send(reply)
    if reply[:1] == Status.DONE:
        _fork_for_each(link, lambda link: Follower(link, found[0], vocabulary.encoder).run())


def _beginning(first: "LLMatcher", memory: "Memory") -> bytes:
    forced = [] if first.is_error() else first.compute_ff_tokens()
    mask = b"" if first.is_error() else first.compute_bitmask()
    if first.is_error():
        return _failed(first.get_error())
    used = resource.getrusage(resource.RUSAGE_SELF)
    head = COMPILED.pack(used.ru_utime + used.ru_stime, len(forced))
    return REPLY.pack(Status.DONE, memory.used_kb(), 0) + head + struct.pack(f"={len(forced)}I", *forced) + mask


class Follower:
    """Follows generations along a grammar."""

    def __init__(self, link: socket.socket, first: "LLMatcher", encoder: Encoder) -> None:
        self._link = link
        self._first = first
        limit_memory(_MEMORY_BYTES + _STACK_BYTES)
        self._memory = Memory()
        self._matchers: dict[int, tuple[LLMatcher, list[int], int]] = {}  # with tokens and kilobytes
        encoder.ask = functools.partial(_ask, link)

    def run(self) -> None:
        """Serve until the parent closes the socket."""
        while request := self._link.recv(MAX_PACKET):
            _limit_time(_STEP_S)
            op, number, keep = OP.unpack_from(request)
            reply = self._answer(op, number, keep, list(memoryview(request[OP.size :]).cast("I")))
            _limit_time(0.0)
            if op != Op.DROP:
                self._link.send(reply)

    def _answer(self, op: bytes, number: int, keep: int, new: list[int]) -> bytes:
        if op == Op.DROP:
            self._matchers.pop(number, None)
            return b""
        before_kb = self._memory.used_kb()
        found = self._matchers.pop(number) if number in self._matchers else (self._first.deep_copy(), [], 0)
        native, tokens, own_kb = found
        if keep < len(tokens):
            new = tokens[:keep] + new
            if native.rollback(len(tokens) - keep):
                new = new[keep:]
            else:
                native, keep = self._first.deep_copy(), 0
            del tokens[keep:]
        taken = native.try_consume_tokens(new) if new else 0
        tokens.extend(new[:taken])
        content = b""
        if taken == len(new) and op == Op.ALLOWED:
            content = native.compute_bitmask()
        elif taken == len(new) and op == Op.FORCED:
            forced = native.compute_ff_tokens()
            ended = not forced and native.is_stopped()
            content = struct.pack(f"=?{len(forced)}I", ended, *forced)
        if native.is_error() or taken < len(new):
            worn = self._worn()
            if worn or native.is_error():
                return _failed(worn or native.get_error(), worn=bool(worn))
        used_kb = self._memory.used_kb()
        own_kb += max(0, used_kb - before_kb)
        self._matchers[number] = native, tokens, own_kb
        if taken < len(new):
            return REPLY.pack(Status.OUTSIDE, len(tokens), 0)
        return REPLY.pack(Status.DONE, used_kb, own_kb) + content

    def _worn(self) -> str:
        """Return why all other generations fail as well, if they do: they share the lexer with its errors.

        A lexer that has reached a limit takes no token, and reports it with the next mask only.
        """
        fresh = self._first.deep_copy()
        fresh.compute_bitmask()
        return fresh.get_error()


class Memory:
    """Memory of this process beyond what it had when it was forked."""

    def __init__(self) -> None:
        self._file = os.open("/proc/self/statm", os.O_RDONLY)
        self._before_kb = 0
        self._before_kb = self.used_kb()

    def used_kb(self) -> int:
        fields = os.pread(self._file, 100, 0).split()
        return max(0, (int(fields[1]) - int(fields[2])) * _PAGE_KB - self._before_kb)


def _ask(link: socket.socket, text: str) -> list[int]:
    link.send(REPLY.pack(Status.ENCODE, 0, 0) + text.encode("utf-8", "replace"))
    reply = link.recv(MAX_PACKET)
    if not reply:
        os._exit(0)
    return list(memoryview(reply[1:]).cast("I"))


def _limit_time(processor_s: float) -> None:
    """End this process if it takes longer (0: no limit). The kernel does it, whatever native code is running."""
    signal.setitimer(signal.ITIMER_PROF, processor_s)
    signal.setitimer(signal.ITIMER_REAL, _LONGEST_S if processor_s else 0.0)


def _failed(reason: str, *, worn: bool = False) -> bytes:
    return REPLY.pack(Status.FAILED, worn, 0) + reason.encode("utf-8", "replace")[:2000]


def _limits() -> "LLParserLimits":
    import llguidance  # noqa: PLC0415

    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,  # some 20 ms
        max_grammar_size=100_000,  # symbols
        max_lexer_states=50_000,  # up to 2 kB each
        step_lexer_fuel=500_000,  # some 50 ms, and never so much where patterns have no counted repetitions
        step_max_items=20_000,  # some 1 ms
        verbose_errors=False,
    )


def _source(kind: str, text: str) -> str:
    from llguidance import LLMatcher  # noqa: PLC0415

    match kind:
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case "lark":
            return LLMatcher.grammar_from_lark(text)
        case "json-object":
            text = '{"type": "object"}'
    return LLMatcher.grammar_from_json_schema(text, overrides=_JSON)


if __name__ == "__main__":
    main()
