import random
from dataclasses import replace
from datetime import UTC, timedelta

import pytest
from hypothesis import given, strategies as st

from fleet_edge.session_log.database import Store
from fleet_edge.session_log.errors import RecordRejected
from fleet_edge.session_log.records import (
    LeaveReason,
    Record,
    segment_number,
)
from schemas.control import Presence
from schemas.reasons import EndReason
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.rows import Rows, all_rows, apply_shuffled, clear, examples
from tests.fleet_edge.store.samples import START, after

LATER = segment_number(after(100))


def test_a_whole_session_is_stored_with_all_that_its_records_tell(store: Store) -> None:
    store.apply([samples.opened(), samples.progress(), samples.judged(), samples.closed()])
    rows = all_rows(store)
    [session], [segment], [judged] = rows["sessions"], rows["segments"], rows["rounds"]
    assert (session["device"], session["seed"], session["mode"]) == ("sensor-1", 2**64 - 1, "residual")
    assert (session["reason"], session["tokens"], session["closed_at"]) == ("stop", 20, after(3))
    assert (session["device_accepted"], session["device_wall_ms"]) == (30, 1600.0)
    assert (session["opened_at"], session["last_at"]) == (START, after(3))
    assert (segment["edge"], segment["tokens"], segment["batch_sum"]) == ("edge-1", 20, 15)
    assert segment["duration_ms"] == 3000.0
    assert (judged["form"], judged["at"]) == ("sparse", after(1))


def test_times_come_back_aware_and_in_utc(store: Store) -> None:
    elsewhere = START.astimezone(tz=None).astimezone(UTC).replace(tzinfo=UTC)
    store.apply([samples.device_seen(at=elsewhere.astimezone())])
    [device] = all_rows(store)["devices"]
    assert device["seen_at"] == START
    assert device["seen_at"].utcoffset() == timedelta(0)


@pytest.mark.parametrize("at_once", [False, True])
def test_latencies_of_a_segment_stay_when_a_later_record_has_none(store: Store, at_once: bool) -> None:
    known = samples.progress(tokens=20, first_token_ms=9.0, gap_p95_ms=4.0)
    records = [samples.opened(), known, samples.progress(tokens=25, at=after(9)), samples.closed(at=after(10))]
    for some in [records] if at_once else [[record] for record in records]:
        store.apply(some)
    [segment] = all_rows(store)["segments"]
    assert (segment["tokens"], segment["first_token_ms"], segment["gap_p95_ms"]) == (25, 9.0, 4.0)
    store.apply([samples.progress(tokens=30, first_token_ms=9.0, gap_p95_ms=3.0, at=after(11))])
    [segment] = all_rows(store)["segments"]
    assert segment["gap_p95_ms"] == 3.0


def test_a_label_that_a_database_could_not_store_is_cleaned(store: Store) -> None:
    store.apply([samples.device_seen(draft_model="a\0b\ud800", software="' OR 1=1; --")])
    [device] = all_rows(store)["devices"]
    assert (device["draft_model"], device["software"]) == ("a?b?", "' OR 1=1; --")


@pytest.mark.parametrize("spoilt", [{"round": 2**63}, {"at": START.replace(tzinfo=None)}, {"drafted": None}])
def test_a_batch_with_an_impossible_record_is_refused_as_a_whole(store: Store, spoilt: dict[str, object]) -> None:
    with pytest.raises(RecordRejected):
        store.apply([samples.opened(), samples.judged(**spoilt)])
    assert not any(all_rows(store).values())


@st.composite
def _streams(draw: st.DrawFn) -> list[Record]:
    """Draw records that edges may write: rising counters, one Open per segment, ends at distinct times."""
    records: list[Record] = []
    ticks = iter(range(1, 10_000))
    for index in range(draw(st.integers(1, 2))):
        session = f"{index:016x}"
        device = f"device-{draw(st.integers(0, 1))}"
        for segment_index in range(draw(st.integers(1, 3))):
            at = after(1000 * segment_index)
            key = {"session": session, "segment": segment_number(at), "device": device}
            edge = f"edge-{draw(st.integers(0, 1))}"
            records.append(samples.opened(**key, edge=edge, resumed_tokens=segment_index, at=at))
            tokens = 0
            for step in range(draw(st.integers(0, 3))):
                tokens += draw(st.integers(0, 5))
                when = at + timedelta(seconds=step + 1)
                told = {"first_token_ms": 7.0 if tokens else None, "gap_p95_ms": 0.5 * tokens if tokens else None}
                records.append(samples.progress(**key, tokens=tokens, queue_ms=1.5 * tokens, at=when, **told))
                records.append(samples.judged(**key, round=step, base=tokens, at=when))
            for end in range(draw(st.integers(0, 2))):
                counters = replace(samples.COUNTERS, tokens=end) if draw(st.booleans()) else None
                reason = draw(st.sampled_from(EndReason))
                when = at + timedelta(seconds=10, microseconds=next(ticks))
                if draw(st.booleans()):
                    records.append(samples.left(**key, reason=draw(st.sampled_from(LeaveReason)), at=when))
                    continue
                why = {"code": f"end-{end}", "sentence": "It failed."} if reason is EndReason.FAILED else {}
                records.append(samples.closed(**key, reason=reason, counters=counters, tokens=end, at=when, **why))
        for _ in range(draw(st.integers(0, 2))):
            presence = draw(st.sampled_from(Presence))
            tick = next(ticks)
            since = {"presence_since": after(tick) if draw(st.booleans()) else None}
            records.append(samples.device_seen(device=device, presence=presence, at=after(tick), **since))
            records.append(samples.device_told(device=device, plan=f"plan-{tick}", at=after(tick)))
            records.append(samples.edge_seen(target=f"target-{tick}", at=after(tick)))
            records.append(samples.edge_load(open_sessions=tick, at=after(tick)))
            records.append(samples.event(id=f"event-{tick}", count=tick, last_at=after(2 * tick), at=after(tick)))
        for _ in range(draw(st.integers(0, 2))):
            # Of its own session or of the other one, by its owner or another device, at any time.
            name, owner = f"{draw(st.integers(0, 1)):016x}", f"device-{draw(st.integers(0, 2))}"
            when = after(draw(st.integers(0, 3000))) + timedelta(microseconds=next(ticks))
            reason = draw(st.sampled_from(EndReason))
            records.append(samples.reported(session=name, device=owner, reason=reason, at=when))
    return records


def test_order_and_repetition_do_not_matter(store: Store) -> None:
    @examples(store)
    @given(stream=_streams(), seed=st.integers(0, 2**32), cuts=st.integers(1, 5))
    def check(stream: list[Record], seed: int, cuts: int) -> None:
        clear(store)
        for record in stream:
            store.apply([record])
        expected = all_rows(store)
        clear(store)
        apply_shuffled(store, stream, seed, cuts)
        assert all_rows(store) == expected

    check()


def _honest(rows: Rows) -> Rows:
    """Return the rows of devices other than the forger, without sums over all devices."""
    del rows["distributions"]
    return {name: [row for row in table if row.get("device") not in {"forger", ""}] for name, table in rows.items()}


def test_another_device_changes_nothing(store: Store) -> None:
    @examples(store)
    @given(stream=_streams(), forged=_streams(), seed=st.integers(0, 2**32))
    def check(stream: list[Record], forged: list[Record], seed: int) -> None:
        clear(store)
        store.apply(stream)
        expected = _honest(all_rows(store))
        clear(store)
        forgeries = [_forged(record) for record in forged if not record.rows.keys() & {"edges", "events"}]
        mixed = [*stream, *forgeries]
        random.Random(seed).shuffle(mixed)
        for start in range(0, len(mixed), 5):
            store.apply(mixed[start : start + 5])
        found = _honest(all_rows(store))
        found["edges"] = expected["edges"]  # an edge that granted the forger something was seen
        assert found == expected

    check()


def _forged(record: Record) -> Record:
    """Return the record as another device's, a second later; with the same ids and segments."""
    rows = {name: {**row, "device": "forger"} for name, row in record.rows.items()}
    return Record(record.at + timedelta(seconds=1), rows)
