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


# Written by release 0.1.
OLD_PROGRESS = (
    b'e83d5bec SegmentProgress {"session":"00112233445566aa","segment":1772620200000000,"tokens":20,"rounds":5,'
    b'"drafted":25,"tested":20,"accepted":15,"uplink_bytes":240,"downlink_bytes":160,"queue_ms":10.0,'
    b'"compute_ms":200.0,"batch_sum":15,"at":"2026-03-04T10:30:02Z"}\n'
)
OLD_ROUND = (
    b'2a4c1d81 RoundJudged {"session":"00112233445566aa","segment":1772620200000000,"round":0,"base":0,"drafted":5,'
    b'"tested":4,"accepted":3,"batch":3,"uplink_bytes":48,"downlink_bytes":32,"form":"sparse","queue_ms":2.0,'
    b'"compute_ms":40.0,"at":"2026-03-04T10:30:01Z"}\n'
)


OLD_EVENT = (
    b'867b3785 EventLogged {"id":"event-1","edge":"edge-1","device":"sensor-1","session":"00112233445566aa",'
    b'"kind":"fault","code":"desync","sentence":"The prefix differs.","at":"2026-03-04T10:30:01Z"}\n'
)


@pytest.mark.parametrize(
    ("line", "record"),
    [
        (OLD_PROGRESS, samples.progress(device=None)),
        (OLD_ROUND, samples.judged(device=None)),
        (OLD_EVENT, samples.event()),
    ],
)
def test_what_an_earlier_release_has_spooled_is_read(line: bytes, record: Record) -> None:
    assert from_line(line) == record


def test_a_counter_that_is_unknown_or_missing_spoils_no_line() -> None:
    kind, _, content = OLD_PROGRESS.partition(b" ")[2].partition(b" ")
    fields = json.loads(content) | {"energy_mj": 7}
    del fields["batch_sum"]
    body = kind + b" " + json.dumps(fields).encode()
    assert from_line(b"%08x %s\n" % (crc32(body), body)) == samples.progress(batch_sum=0, device=None)


@pytest.mark.parametrize("body", [b"Stranger {}", b"RoundJudged {}", b"RoundJudged", b"", b"\xff {}"])
def test_a_sound_line_of_another_version_is_not_read(body: bytes) -> None:
    assert from_line(b"%08x %s\n" % (crc32(body), body)) is None
