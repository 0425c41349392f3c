import json
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest

from fleet_edge.session_log.errors import SpoolFull, StoreError
from fleet_edge.session_log.records import Record, lift_record
from fleet_edge.session_log.spool import Spool, from_line, to_line
from tests.fleet_edge.store import samples

LINE = len(to_line(samples.judged(round=10)))


def _rounds(start: int, stop: int) -> list[Record]:
    return [samples.judged(round=number) for number in range(start, stop)]


def _drain(spool: Spool) -> list[Record]:
    records: list[Record] = []
    while batch := spool.peek(7):
        records += batch
        spool.confirm()
    return records


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    opened = Spool(tmp_path / "spool", file_bytes=5 * LINE)
    yield opened
    opened.close()


def test_records_come_back_in_order_and_then_leave_nothing(spool: Spool) -> None:
    spool.append(_rounds(10, 30))
    spool.append(_rounds(30, 33))
    assert _drain(spool) == _rounds(10, 33)
    assert spool.empty
    assert not list(spool.folder.iterdir())


def test_what_is_not_confirmed_is_given_again(spool: Spool) -> None:
    spool.append(_rounds(10, 20))
    assert spool.peek(4) == _rounds(10, 14)
    assert spool.peek(4) == _rounds(10, 14)
    spool.confirm()
    assert spool.peek(4) == _rounds(14, 18)


def test_files_are_rotated_and_removed_one_by_one(spool: Spool) -> None:
    for number in range(10, 22):
        spool.append(_rounds(number, number + 1))
    assert len(list(spool.folder.iterdir())) == 3
    spool.peek(100)
    spool.confirm()
    assert len(list(spool.folder.iterdir())) == 2


def test_a_restart_finds_what_was_left(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    first.append(_rounds(10, 15))
    first.close()
    second = Spool(tmp_path)
    second.append(_rounds(15, 16))
    assert _drain(second) == _rounds(10, 16)
    second.close()


def test_other_files_of_the_folder_are_left_alone(tmp_path: Path) -> None:
    for name in (
        "spool-00000000ab.jsonl",
        "spool-1.jsonl",
        "spool-\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661.jsonl",
        "notes.txt",
    ):
        (tmp_path / name).write_text("not ours\n", encoding="utf-8")
    (tmp_path / "spool-0000000003.jsonl").mkdir()
    (tmp_path / "spool-0000000004.jsonl").symlink_to("nowhere")
    strays = {path.name for path in tmp_path.iterdir()}
    for start in (10, 20):  # the second finds the first one's file between the strays
        spool = Spool(tmp_path)
        spool.append(_rounds(start, start + 3))
        spool.close()
    spool = Spool(tmp_path)
    assert _drain(spool) == _rounds(10, 13) + _rounds(20, 23)
    assert {path.name for path in tmp_path.iterdir()} == strays
    spool.close()


def test_files_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "spool-9999999999.jsonl").write_bytes(to_line(_rounds(1, 2)[0]))
    spool = Spool(tmp_path)
    spool.append(_rounds(2, 3))
    spool.close()
    spool = Spool(tmp_path)
    assert _drain(spool) == _rounds(1, 3)
    spool.close()


def test_a_torn_last_line_is_skipped_and_its_neighbours_are_read(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    first.append(_rounds(10, 15))
    first.close()
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    second = Spool(tmp_path)
    second.append(_rounds(20, 21))
    assert _drain(second) == _rounds(10, 14) + _rounds(20, 21)
    assert second.damaged == 1
    second.close()


def test_a_file_of_damaged_lines_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "spool-0000000001.jsonl").write_bytes(b"\xff" * 200_000)
    spool = Spool(tmp_path)
    spool.append(_rounds(10, 12))
    assert _drain(spool) == _rounds(10, 12)
    assert spool.damaged > 0
    assert spool.empty
    spool.close()


def test_the_bound_is_kept_and_nothing_of_a_refused_batch_stays(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=4 * LINE)
    spool.append(_rounds(10, 13))
    with pytest.raises(SpoolFull):
        spool.append(_rounds(13, 15))
    assert _drain(spool) == _rounds(10, 13)
    spool.append(_rounds(13, 15))
    assert _drain(spool) == _rounds(13, 15)
    spool.close()


def test_a_write_that_the_disk_cuts_short_leaves_no_half_line(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    spool.append(_rounds(10, 12))

    def out_of_space(file: object, data: bytes) -> None:
        file.write(data[: LINE // 2])  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fleet_edge.session_log.spool._write", out_of_space)
        with pytest.raises(SpoolFull):
            spool.append(_rounds(12, 14))
    spool.append(_rounds(20, 21))
    assert _drain(spool) == _rounds(10, 12) + _rounds(20, 21)
    assert spool.damaged == 0


def test_a_record_that_no_line_can_hold_is_left_out(spool: Spool) -> None:
    spool.append([samples.event(sentence=object()), *_rounds(10, 11)])
    assert _drain(spool) == _rounds(10, 11)
    assert spool.damaged == 1


def test_two_processes_may_not_share_a_spool(spool: Spool) -> None:
    with pytest.raises(StoreError):
        Spool(spool.folder)


RECORDS: list[Record] = [
    samples.device_seen(draft_model='quotes " and\nnewlines'),
    samples.edge_seen(),
    samples.opened(),
    samples.progress(queue_ms=0.1 + 0.2, prefill_ms=2.5, resampled=1),
    samples.judged(form=None, prefill_ms=2.5),
    samples.left(),
    samples.closed(),
    samples.closed(counters=None),
    samples.reported(),
    samples.event(device=None, session=None, count=54_495, last_at=samples.after(9)),
    samples.quarantined(until_at=None),
    lift_record("sensor-1", "edge-1", samples.after(9)),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: "-".join(record.rows))
def test_every_kind_of_record_comes_back_as_it_was(record: Record) -> None:
    line = to_line(record)
    assert line.count(b"\n") == 1
    assert from_line(line) == record


def test_a_line_with_any_byte_changed_or_cut_is_not_read() -> None:
    line = to_line(samples.judged())
    for position in range(len(line) - 1):
        changed = bytearray(line)
        changed[position] ^= 1
        assert from_line(bytes(changed)) is None
        assert from_line(line[:position]) is None


def test_a_counter_that_is_unknown_or_missing_spoils_no_line() -> None:
    at, rows = json.loads(to_line(samples.progress()).partition(b" ")[2])
    rows["segments"]["energy_mj"] = 7
    del rows["segments"]["batch_sum"]
    body = json.dumps([at, rows]).encode()
    record = samples.progress()
    del record.rows["segments"]["batch_sum"]  # type: ignore[attr-defined]
    assert from_line(b"%08x %s\n" % (crc32(body), body)) == record


@pytest.mark.parametrize(
    "body",
    [
        b'["2026-03-04T10:30:00Z",{"strangers":{}}]',
        b'["2026-03-04T10:30:00Z",{"rounds":{}}]',
        b'["2026-03-04",7]',
        b"{}",
        b"",
        b"\xff",
    ],
)
def test_a_sound_line_of_another_version_is_not_read(body: bytes) -> None:
    assert from_line(b"%08x %s\n" % (crc32(body), body)) is None


def test_others_may_not_look_into_the_spool(spool: Spool) -> None:
    assert spool.folder.stat().st_mode & 0o077 == 0
