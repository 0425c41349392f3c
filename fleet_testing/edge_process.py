"""Edge process over a real target, for benchmarks."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleet_edge.verifiers.contract import VerifierError

__all__ = ["real_edge"]


@contextmanager
def real_edge(
    port: int, *, fleet: str, models: Path, folder: Path, dtype: str, threads: int = 0, log: str = "log"
) -> Iterator[Path]:
    """Run `fleet edge run`.

    Args:
        port: The broker's, on loopback.
        fleet: Topic level.
        models: Folder of a prepared family; its `target` is served.
        folder: For the session log and the spool.
        dtype: Of the target's weights.
        threads: Of torch; 0 leaves it to torch.
        log: Name of the session log.

    Yields:
        The session log's file (SQLite); complete when the edge has ended.

    Raises:
        VerifierError: The edge did not start.
    """
    database = folder / f"{log}.sqlite3"
    command = [
        sys.executable, "-m", "fleet_cli.main", "edge", "run", "--fleet", fleet, "--port", str(port),
        "--target", str(models / "target"), "--dtype", dtype, "--threads", str(threads),
        "--db", f"sqlite:///{database}", "--spool", str(folder / "spool"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        if not any(" is online at " in line for line in process.stderr):
            raise VerifierError("The edge did not start.")
        yield database
    finally:
        process.terminate()
        process.communicate(timeout=60)
