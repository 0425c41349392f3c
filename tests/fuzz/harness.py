"""Harness of the fuzz targets: runs one input, measures it, and keeps what went wrong.

A target takes bytes and returns. What it raises is a crash: targets catch the errors that the code under them
documents, and nothing else. Errors that the code survives and logs are crashes as well.
"""

import gc
import hashlib
import json
import logging
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

Run = Callable[[bytes], None]

SLOW_MS: Final = 50.0
"""An input that takes more CPU time than this is a finding."""

SUSPECT_MS: Final = 10.0
REPEATS: Final = 3  # of an input that seems to be the slowest: the least of its times goes
LEAP_MB: Final = 64  # of the process's peak memory, in one input
COLLECT_EVERY: Final = 256
MAX_FINDINGS: Final = 20


class Finding(Exception):  # noqa: N818 - reads as what it says
    """A property that does not hold."""


@dataclass(slots=True)
class Stats:
    """What a run has seen.

    Attributes:
        cpu_s: Spent in the target.
        slowest_ms: CPU time of the slowest input, the least of three runs.
        collection_ms: Longest garbage collection; they happen between inputs.
        warm_mb: Resident memory after a tenth of the run.
        crashes: Distinct findings, by place.
        slow: Inputs above `SLOW_MS`.
    """

    inputs: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    slowest_ms: float = 0.0
    slowest_bytes: int = 0
    collection_ms: float = 0.0
    warm_mb: float = 0.0
    last_mb: float = 0.0
    crashes: list[str] = field(default_factory=list)
    slow: int = 0


class SurvivedErrors(logging.Handler):
    """Collects errors logged while an input runs; formats all messages, because one may hold hostile text."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.errors: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage().encode()
        if record.levelno >= logging.ERROR:
            self.errors.append(record)

    def check(self) -> None:
        """Raise a `Finding` if errors were logged since the last check."""
        if self.errors:
            record, self.errors = self.errors[0], []
            cause = record.exc_info[1] if record.exc_info else None
            raise Finding(f"survived and logged: {record.getMessage()[:300]}") from cause

    def install(self) -> None:
        root = logging.getLogger()
        root.handlers[:] = [self]
        root.setLevel(logging.INFO)
        logging.getLogger("asyncio").setLevel(logging.ERROR)


class Watch:
    """Runs a target's inputs one by one; `findings` is the folder for those that crash or are slow."""

    def __init__(self, run: Run, findings: Path) -> None:
        self.stats = Stats()
        self._run = run
        self._findings = findings
        self._log = SurvivedErrors()
        self._log.install()
        self._seen: set[str] = set()
        gc.collect()
        gc.freeze()
        gc.disable()
        self._peak_mb = _peak_mb()

    def __call__(self, data: bytes) -> None:
        stats = self.stats
        took_ms = self._once(data)
        stats.inputs += 1
        stats.cpu_s += took_ms / 1e3
        if took_ms > max(SUSPECT_MS, stats.slowest_ms):
            took_ms = min([took_ms, *(self._once(data) for _ in range(REPEATS - 1))])
        if took_ms > stats.slowest_ms:
            stats.slowest_ms, stats.slowest_bytes = took_ms, len(data)
            self._save("slowest", data, once=True)
            if took_ms > SLOW_MS:
                stats.slow += 1
                self._save("slow", data)
        if stats.inputs % COLLECT_EVERY == 0:
            self._collect()

    @staticmethod
    def close() -> None:
        gc.enable()
        gc.unfreeze()

    def note_memory(self, *, warm: bool = False) -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        self.stats.last_mb = pages * resource.getpagesize() / 2**20
        if warm:
            self.stats.warm_mb = self.stats.last_mb

    def write(self, path: Path) -> None:
        whole = path.with_suffix(".new")
        whole.write_text(json.dumps(asdict(self.stats)), encoding="utf-8")
        whole.replace(path)

    def _once(self, data: bytes) -> float:
        """Run an input; return its CPU time in milliseconds."""
        began = time.thread_time()
        try:
            self._run(data)
            took_ms = (time.thread_time() - began) * 1e3
            self._log.check()
        except Exception as error:  # noqa: BLE001 - all of them are findings
            self._log.errors.clear()
            self._crash(data, error)
            return 0.0
        if took_ms > 1.0:
            peak_mb = _peak_mb()
            if peak_mb > self._peak_mb + LEAP_MB:
                self._crash(data, Finding(f"the input takes more than {LEAP_MB} MB"))
            self._peak_mb = max(peak_mb, self._peak_mb)
        return took_ms

    def _collect(self) -> None:
        began = time.thread_time()
        gc.collect()
        self.stats.collection_ms = max(self.stats.collection_ms, (time.thread_time() - began) * 1e3)

    def _crash(self, data: bytes, error: BaseException) -> None:
        where = _place(error)
        if where in self._seen or len(self._seen) >= MAX_FINDINGS:
            return
        self._seen.add(where)
        self.stats.crashes.append(where)
        path = self._save("crash", data)
        path.with_suffix(".txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")

    def _save(self, kind: str, data: bytes, *, once: bool = False) -> Path:
        self._findings.mkdir(parents=True, exist_ok=True)
        name = kind if once else f"{kind}-{hashlib.sha256(data).hexdigest()[:12]}"
        path = self._findings / f"{name}.bin"
        path.write_bytes(data)
        return path


def _peak_mb() -> float:
    """Return the peak of this program; that of `getrusage` begins with its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _place(error: BaseException) -> str:
    """Return a key of a finding: the first cause's type and the last line of ours that it passed."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    frames = traceback.extract_tb(first.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    frame = (ours or frames)[-1] if frames else None
    where = f"{Path(frame.filename).name}:{frame.lineno}" if frame else "?"
    return f"{type(first).__name__} at {where}: {str(first)[:200]}"
