"""Available memory: what a process may still take before the machine, or the control group that it is in, runs out."""

from pathlib import Path
from typing import Final

_KIBI: Final = 1024


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that can be taken now; None where the system does not say.

    Args:
        root: Above `proc` and `sys`.
    """
    found = [room for room in (_of_machine(root), _of_groups(root)) if room is not None]
    return min(found, default=None)


def _of_machine(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        return _KIBI * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration, IndexError):
        return None


def _of_groups(root: Path) -> int | None:
    """Return what the tightest of the control groups (version 2) that this process is in leaves it."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        path = next(line[3:] for line in lines if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    top = root / "sys/fs/cgroup"
    group = top / path.strip("/")
    rooms = []
    while True:
        room = _of_group(group)
        if room is not None:
            rooms.append(room)
        if group == top or top not in group.parents:
            return min(rooms, default=None)
        group = group.parent


def _of_group(group: Path) -> int | None:
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))  # "max" for none
        used = int((group / "memory.current").read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        kept = {name: int(count) for name, count in (line.split() for line in lines)}
    except (OSError, ValueError):
        return None
    # Pages of files count as used, and are given up when somebody wants memory.
    return max(0, limit - used + kept.get("active_file", 0) + kept.get("inactive_file", 0))
