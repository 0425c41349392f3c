"""Agreement of the session log with what the devices know of their texts."""

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.faults.tally import Tally
from schemas.reasons import EndReason

_NOT_WHOLE: Final = (EndReason.LOST.value, EndReason.FAILED.value, EndReason.CANCELLED.value)


def disagreements(database: Path, tally: Tally) -> list[str]:
    """Return a sentence for each session of which the log and its device do not say the same.

    What a device has ended must be in the log with its reason and its number of tokens. What else is in the log must be
    known there as not whole, and there may be no more of it than texts that failed and processes that were killed.
    Where a device and its edge were killed it may still be open: only housekeeping is left to end it, hours later.

    Args:
        database: SQLite file; nobody writes any more.
        tally: What the devices have reported.
    """
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT session, device, reason, tokens, device_tokens FROM sessions").fetchall()
    logged = {session: tuple(rest) for session, *rest in rows}
    return [*_of_ended(logged, tally), *_of_others(logged, tally)]


def _of_ended(logged: dict[str, tuple[object, ...]], tally: Tally) -> Iterator[str]:
    for session, text in tally.texts.items():
        row = logged.get(session)
        if row is None:
            if text.tokens:  # one that was cancelled before an edge took it leaves no row
                yield f"{session} of {text.device} is not in the log; it has {text.tokens} tokens"
            continue
        expected = (text.device, text.reason, text.tokens, text.tokens)
        if row != expected:
            yield f"{session}: the log says {row}, its device {expected}"


def _of_others(logged: dict[str, tuple[object, ...]], tally: Tally) -> Iterator[str]:
    others: Counter[str] = Counter()
    for session, (device, reason, *_) in logged.items():
        if session in tally.texts:
            continue
        others[str(device)] += 1
        if reason is None and tally.edge_kills and tally.killed[str(device)]:
            continue
        if reason not in _NOT_WHOLE:
            yield f"{session} of {device} did not end at its device; the log says {reason}"
    for device, number in others.items():
        most = tally.failed[device] + tally.killed[device]
        if number > most:
            yield f"{device} has {number} sessions in the log that it does not know, and can have left {most}"
