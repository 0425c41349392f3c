"""Sampler: where a process spends its processor time, by part of the program, from inside.

Every few milliseconds each thread's own clock is read, and the time that it has taken since is laid to where it stands:
to the innermost function of its stack that belongs to a part. Threads that wait take no time, and count for nothing.
"""

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from types import FrameType
from typing import Final

__all__ = ["PARTS", "StackSampler", "part_of"]

_EVERY_S: Final = 0.003
_LINK_THREAD: Final = "link-"

PARTS: Final = (
    ("fleet_edge.verifiers", "engine"),
    ("benchmarks.shared.metered_edge", "engine"),
    ("tests.support", "engine"),
    ("llama_cpp", "engine"),
    ("dssd", "judging"),
    ("fleet_edge.batching.judging", "judging"),
    ("fleet_edge.batching.shaping", "judging"),
    ("fleet_edge.batching.topk", "judging"),
    ("fleet_edge.guard", "gate"),
    ("fleet_edge.answers.recorder", "record"),
    ("fleet_edge.answers.event_counts", "record"),
    ("fleet_edge.session_log", "record"),
    ("fleet_edge.store", "record"),
    ("sqlalchemy", "record"),
    ("fleet_edge.intake", "decode"),
    ("fleet_edge.answers", "publish"),
    ("fleet_edge.sessions", "sessions"),
    ("fleet_edge.handlers", "sessions"),
    ("fleet_edge.batching", "scheduler"),
    ("fleet_edge.orchestrator", "scheduler"),
    ("fleet_edge.service", "scheduler"),
)
"""Modules by the part that they belong to; the first that a name begins with counts."""


def part_of(functions: Iterator[tuple[str, str]], thread: str) -> str:
    """Return the part that a stack stands in.

    Args:
        functions: Module and name of each function, the innermost first.
        thread: Name of the thread.
    """
    for module, function in functions:
        if module == "schemas.codec":
            if function.startswith("decode_"):
                return "decode"
            if function.startswith("encode_"):
                return "encode"
        elif module.startswith(("fleet_link", "paho")):
            return "link" if thread.startswith(_LINK_THREAD) else "publish"
        else:
            for prefix, part in PARTS:
                if module.startswith(prefix):
                    return part
    return "other"


class StackSampler:
    """Samples this process on a thread of its own, which it leaves out."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._before: dict[int, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._take()
        self.seconds.clear()
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """End; return the seconds of processor time by part, the greatest first."""
        self._stopping.set()
        self._thread.join()
        return dict(sorted(self.seconds.items(), key=lambda item: -item[1]))

    def _run(self) -> None:
        while not self._stopping.wait(_EVERY_S):
            self._take()

    def _take(self) -> None:
        frames = sys._current_frames()  # noqa: SLF001 - the interpreter's own name for it
        for thread in threading.enumerate():
            frame = frames.get(thread.ident or 0)
            if thread is self._thread or frame is None or thread.native_id is None:
                continue
            try:
                now = time.clock_gettime(_clock_of(thread.native_id))
            except OSError:  # it has just ended
                continue
            spent = now - self._before.get(thread.native_id, now)
            self._before[thread.native_id] = now
            if spent > 0.0:
                self.seconds[part_of(_functions(frame), thread.name)] += spent


def _clock_of(native_id: int) -> int:
    """Return Linux's number of the clock of a thread's processor time."""
    return (~native_id << 3) | 6


def _functions(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    while frame is not None:
        yield frame.f_globals.get("__name__", ""), frame.f_code.co_name
        frame = frame.f_back
