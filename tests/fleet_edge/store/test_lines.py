import json
from zlib import crc32

import pytest

from fleet_edge.store.records.fences import FenceLifted
from fleet_edge.store.records.record import Record
from fleet_edge.store.spool import from_line, to_line
from tests.fleet_edge.store import samples

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
    samples.fenced(until=None),
    FenceLifted(device="sensor-1", by="edge-1", at=samples.after(9)),
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


def test_a_counter_that_is_unknown_or_missing_spoils_no_line() -> None:
    kind, _, content = to_line(samples.progress()).partition(b" ")[2].partition(b" ")
    fields = json.loads(content) | {"energy_mj": 7}
    del fields["batch_sum"]
    body = kind + b" " + json.dumps(fields).encode()
    assert from_line(b"%08x %s\n" % (crc32(body), body)) == samples.progress(batch_sum=0)


@pytest.mark.parametrize("body", [b"Stranger {}", b"RoundJudged {}", b"RoundJudged", b"", b"\xff {}"])
def test_a_sound_line_of_another_version_is_not_read(body: bytes) -> None:
    assert from_line(b"%08x %s\n" % (crc32(body), body)) is None
