"""Meter of a process: its memory and processor time over time, sampled on a thread."""

import threading
import time
from collections.abc import Callable
from typing import Final, Self

import psutil

__all__ = ["ProcessMeter"]

_SAMPLE_S: Final = 0.2
_MIB: Final = 1 << 20


class ProcessMeter:
    """Memory and processor time of a process, sampled on a thread. Use it as a context manager.

    Args:
        pid: Of the process.
        clock: Monotonic seconds.
    """

    def __init__(self, pid: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._process = psutil.Process(pid)
        self._clock = clock
        self._samples: list[tuple[float, float, float]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, name=f"meter-{pid}", daemon=True)

    def __enter__(self) -> Self:
        """Begin."""
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._stopping.set()
        self._thread.join()

    def memory_mb(self, begin: float, end: float) -> float:
        """Return the greatest resident memory between two moments; 0 if it did not live then."""
        return max((memory for at, memory, _ in list(self._samples) if begin <= at <= end), default=0.0)

    def cpu(self, begin: float, end: float) -> float:
        """Return the share of one core that it took between two moments."""
        within = [(at, cpu) for at, _, cpu in list(self._samples) if begin - _SAMPLE_S <= at <= end + _SAMPLE_S]
        if len(within) < 2 or within[-1][0] == within[0][0]:
            return 0.0
        return (within[-1][1] - within[0][1]) / (within[-1][0] - within[0][0])

    def _sample(self) -> None:
        while not self._stopping.wait(_SAMPLE_S):
            self._take()

    def _take(self) -> None:
        try:
            with self._process.oneshot():
                memory, times = self._process.memory_info().rss, self._process.cpu_times()
        except psutil.Error:
            return
        self._samples.append((self._clock(), memory / _MIB, times.user + times.system))
