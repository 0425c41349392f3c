import os
import sqlite3
import time
from pathlib import Path

from fleet_bench.hostile.meters import ProcessMeter, Throughput, rows_beside
from fleet_edge.store.database import open_store


def test_a_rate_counts_what_was_committed_between_two_moments() -> None:
    honest = Throughput()
    for at, number in ((1.0, 5), (2.0, 7), (3.0, 100)):
        honest.take({"event": "tokens", "at": at, "number": number})
    assert honest.rate(1.0, 3.0) == 6.0
    assert honest.count(2.0) == 107


def test_texts_that_failed_or_came_out_otherwise_are_told() -> None:
    honest = Throughput()
    honest.take({"event": "text", "resumes": 2, "same": True, "tokens": []})
    honest.take({"event": "text", "resumes": 0, "same": False, "tokens": []})
    honest.take({"event": "failed", "sentence": "No edge."})
    assert (honest.texts, honest.resumes, honest.differing, honest.failed) == (2, 2, 1, ["No edge."])


def test_memory_and_processor_time_of_a_process_are_sampled() -> None:
    began = time.monotonic()
    with ProcessMeter(os.getpid()) as meter:
        pass
    assert meter.memory_mb(began, time.monotonic()) > 1
    assert meter.memory_mb(began - 2, began - 1) == 0
    assert meter.cpu(began, time.monotonic()) == 0  # one sample is no span


def test_rows_of_honest_work_are_left_out_and_those_of_nobody_are_not(tmp_path: Path) -> None:
    database = tmp_path / "log.sqlite3"
    open_store(f"sqlite:///{database}").close()
    before = rows_beside(database, ["honest"])
    with sqlite3.connect(database) as connection:
        for device in ("honest", "hostile"):
            connection.execute(
                "INSERT INTO devices (device, first_seen_at, seen_at) VALUES (?, '2026-01-01', '2026-01-01')", (device,)
            )
            connection.execute(
                "INSERT INTO sessions (session, device, opened_at, last_at, last_segment) "
                "VALUES (?, ?, '2026-01-01', '2026-01-01', 1)",
                (f"s-{device}", device),
            )
            connection.execute(
                "INSERT INTO rounds (session, segment, round, base, drafted, tested, accepted, batch, uplink_bytes, "
                "downlink_bytes, queue_ms, compute_ms, at) VALUES (?, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, '2026-01-01')",
                (f"s-{device}",),
            )
        connection.execute(
            "INSERT INTO sessions (session, opened_at, last_at, last_segment) "
            "VALUES ('of nobody', '2026-01-01', '2026-01-01', 1)"
        )
    # Of the hostile one: itself, its session, its round; and the session that nobody owns.
    assert rows_beside(database, ["honest"]) - before == 4
