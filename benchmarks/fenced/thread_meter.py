"""Meter of threads: the processor time of each thread of a process, from Linux's /proc."""

import os
from pathlib import Path
from typing import Final

__all__ = ["thread_times_s"]

_TICK_S: Final = 1.0 / os.sysconf("SC_CLK_TCK")
_USER, _SYSTEM = 11, 12  # fields of `stat` behind the name


def thread_times_s(pid: int) -> dict[int, float]:
    """Return the seconds of processor time that each thread has taken, by its number.

    To the nanosecond where the kernel counts so (`schedstat`), else in ticks, mostly of 10 ms.
    """
    times = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            times[int(task.name)] = _time_s(task)
        except OSError:
            continue  # it has ended meanwhile
    return times


def _time_s(task: Path) -> float:
    schedstat = task / "schedstat"
    if schedstat.exists():
        return int(schedstat.read_text().split()[0]) / 1e9
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[_USER]) + int(fields[_SYSTEM])) * _TICK_S
