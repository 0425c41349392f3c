from zlib import crc32

import pytest

from fleet_edge.store.records import Record
from fleet_edge.store.spool import from_line, to_line
from tests.fleet_edge.store import samples

RECORDS: list[Record] = [
    samples.device_seen(draft_model='quotes " and\nnewlines'),
    samples.edge_seen(),
    samples.opened(),
    samples.progress(queue_ms=0.1 + 0.2),
    samples.judged(form=None),
    samples.left(),
    samples.closed(),
    samples.closed(counters=None),
    samples.event(device=None, session=None),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
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


@pytest.mark.parametrize("body", [b"Stranger {}", b"RoundJudged {}", b"RoundJudged", b"", b"\xff {}"])
def test_a_sound_line_of_another_version_is_not_read(body: bytes) -> None:
    assert from_line(b"%08x %s\n" % (crc32(body), body)) is None
