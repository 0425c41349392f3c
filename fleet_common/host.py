"""The machine and this process: memory, systemd, state and cache folders, atomic file writes."""

import contextlib
import ctypes
import fcntl
import logging
import os
import resource
import secrets
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Final, Self

NVIDIA_DRIVER: Final = Path("/dev/nvidiactl")
"""Exists wherever the driver of an NVIDIA GPU is loaded, unless systemd hides the devices."""

_KIBI: Final = 1024
_log = logging.getLogger(__name__)


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still allocate; None if the system does not say."""
    found = [room for room in (_of_machine(root), _of_groups(root)) if room is not None]
    return min(found, default=None)


def _of_machine(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        return _KIBI * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration, IndexError):
        return None


def _of_groups(root: Path) -> int | None:
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
    # Pages of files count as used, but the kernel drops them when memory is needed.
    return max(0, limit - used + kept.get("active_file", 0) + kept.get("inactive_file", 0))


def resident_memory() -> int | None:
    """Return the bytes of this process in memory; None if the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


_M_ARENA_MAX: Final = -8  # mallopt(3)
_ARENAS_VARIABLE: Final = "MALLOC_ARENA_MAX"  # the administrator's choice


def use_one_heap() -> bool:
    """Make all threads that start from now on share one heap; return whether the C library can.

    glibc has a heap for each of many threads and keeps memory that was freed in the middle of one. Long-lived blocks
    spread over all heaps, and the process stays as large as its largest backlog. A Python program loses nothing with
    one heap: its threads allocate in turns anyway. The environment variable `MALLOC_ARENA_MAX` takes precedence.
    """
    setting = None if _ARENAS_VARIABLE in os.environ else _glibc_function("mallopt", ctypes.c_int, ctypes.c_int)
    return setting is not None and setting(_M_ARENA_MAX, 1) != 0


def give_back_free_memory() -> bool:
    """Return free memory to the machine (glibc only); return whether there was any."""
    trim = _glibc_function("malloc_trim", ctypes.c_size_t)
    return trim is not None and trim(0) != 0


@cache
def _glibc_function(name: str, *arguments: type) -> Callable[..., int] | None:
    """Return a function of the C library of this process, if that is glibc."""
    try:
        library = ctypes.CDLL(None)
        found = library[name]
        library.gnu_get_libc_version  # noqa: B018 - others have functions of that name that do other things
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes, found.restype = arguments, ctypes.c_int
    return found


def limit_memory(bytes_more: int) -> None:
    """Limit what this process may allocate in addition, without a core dump; files that are mapped do not count."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])  # as RLIMIT_DATA counts
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = pages * os.sysconf("SC_PAGESIZE") + bytes_more
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def python_path() -> str:
    """Return the PYTHONPATH of a child, started with `-P`, that finds the same modules as this process."""
    return os.pathsep.join(place or str(Path.cwd()) for place in sys.path)


# As sd_watchdog_enabled(3) advises: twice in the time after which systemd kills.
_TIMES: Final = 2
_MICRO: Final = 1_000_000


class Systemd:
    """Send notifications to systemd: sd_notify(3), one datagram to the socket named in the environment.

    Without such a socket (`address` None), as in a shell, nothing is sent. `address` may be `@` and a name in the
    abstract namespace. systemd kills the process after `watchdog_s` of silence.
    """

    def __init__(
        self, address: str | None, *, watchdog_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._address = "\0" + address[1:] if address is not None and address.startswith("@") else address
        self._every_s = None if address is None or watchdog_s is None else watchdog_s / _TIMES
        self._clock = clock
        self._due = clock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        micros = environment.get("WATCHDOG_USEC", "")
        # A child inherits the environment, but systemd does not watch it.
        watched = micros.isdecimal() and environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        return cls(environment.get("NOTIFY_SOCKET"), watchdog_s=int(micros) / _MICRO if watched else None)

    def ready(self, status: str) -> None:
        self._notify(f"READY=1\nSTATUS={' '.join(status.split())}")

    def alive(self) -> None:
        """Report that the main loop runs; a report is sent only when due."""
        if self._every_s is not None and self._clock() >= self._due:
            self._due = self._clock() + self._every_s
            self._notify("WATCHDOG=1")

    def watch(self, probe: Callable[[], object]) -> None:
        """Report on a thread that the service lives, each time that `probe` has returned.

        `probe` touches what could hang; if it hangs or raises, the reports end.
        """
        if self._every_s is not None:
            self._thread = threading.Thread(
                target=self._watch, args=(probe, self._every_s), name="watchdog", daemon=True
            )
            self._thread.start()

    def stopping(self) -> None:
        """Report that the service is stopping; the thread of `watch` goes on until `close`."""
        self._notify("STOPPING=1")

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=self._every_s)

    def _watch(self, probe: Callable[[], object], every_s: float) -> None:
        while not self._ended.is_set():
            probe()
            self._notify("WATCHDOG=1")
            self._ended.wait(every_s)

    def _notify(self, message: str) -> None:
        if self._address is None:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(0)
            try:
                sender.sendto(message.encode(), self._address)
            except OSError:
                return  # systemd is away or busy; the service goes on


_FOLDER: Final = "dssd-fleet"


def _standard_folder(environment: Mapping[str, str], *, service: str, user: str, default: str) -> Path | None:
    """Return a folder, which need not exist; None for a user without a home.

    `service` is systemd's variable, `user` the XDG variable of its parent, `default` that parent below the home.
    """
    given = environment.get(service, "").partition(":")[0]
    if given:
        return Path(given)
    base = environment.get(user, "")
    if base and Path(base).is_absolute():  # others are to be ignored, as the XDG specification says
        return Path(base) / _FOLDER
    try:
        return Path.home() / default / _FOLDER
    except RuntimeError:
        return None


def state_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder for state that survives a restart, and whose loss costs only speed."""
    return _standard_folder(environment, service="STATE_DIRECTORY", user="XDG_STATE_HOME", default=".local/state")


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder of cache files, which need not exist; None for a user without a home."""
    return _standard_folder(environment, service="CACHE_DIRECTORY", user="XDG_CACHE_HOME", default=".cache")


def private_folder(folder: Path) -> Path | None:
    """Return a folder, made if it is missing, that only this user can write to; None, and a warning, if it is not."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        _log.info("Nothing is kept in %s for later starts: %s", folder, error)
        return None
    of_others = found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if of_others or not stat.S_ISDIR(found.st_mode):
        _log.warning(
            "Nothing is kept in %s for later starts: other users may write to it; correct its owner and mode.", folder
        )
        return None
    return folder


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, *, timeout_s: float | None = None) -> Iterator[None]:
    """Lock a file or folder against other processes that do the same; raises TimeoutError.

    The kernel unlocks it when the process ends.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if timeout_s is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        else:
            deadline = time.monotonic() + timeout_s
            while not _try_lock(descriptor):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{path} is locked by another process.")
                time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


_LOCK_POLL_S: Final = 0.05


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_atomically(path: Path, content: bytes, *, mode: int = 0o600, keep_owner: bool = False) -> None:
    """Replace a file in an existing folder; raise OSError if it cannot be written.

    A reader sees the old or the new content, whole, also after a power failure. The file has the permissions `mode`
    from the first byte on; with `keep_owner`, in the end those of the replaced file, and its owner if possible.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # the umask may have taken more than we ask
            if keep_owner:
                with contextlib.suppress(OSError):
                    old = path.stat()
                    os.fchmod(descriptor, old.st_mode & 0o777)
                    os.fchown(descriptor, old.st_uid, old.st_gid)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        draft.replace(path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)
