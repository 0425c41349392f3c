from dataclasses import fields

import pytest
from sqlalchemy import Table

from fleet_edge.counters import SEGMENT_COUNTERS, SegmentCounters
from fleet_edge.store.models import Base, RollupRow, SegmentRow
from fleet_edge.store.records import SegmentProgress
from fleet_edge.store.views import Tally

DISTINCT = SegmentCounters(**{name: number for number, name in enumerate(SEGMENT_COUNTERS, start=1)})


def test_sums_are_of_each_counter() -> None:
    both = DISTINCT + DISTINCT
    assert [getattr(both, name) for name in SEGMENT_COUNTERS] == [2 * n for n in range(1, len(SEGMENT_COUNTERS) + 1)]


def test_nothing_counted_is_zero_and_has_no_rates() -> None:
    nothing = SegmentCounters()
    assert {getattr(nothing, name) for name in SEGMENT_COUNTERS} == {0}
    assert nothing.mean_batch is nothing.acceptance is nothing.queue_ms_per_round is None


def test_rates_of_a_step_are_over_the_rounds_that_were_verified() -> None:
    counted = SegmentCounters(rounds=3, resampled=1, batch_sum=9, compute_ms=80.0, queue_ms=6.0, prefill_ms=30.0)
    assert (counted.mean_batch, counted.compute_ms_per_round) == (4.5, 40.0)
    assert (counted.queue_ms_per_round, counted.prefill_ms_per_round) == (2.0, 10.0)


@pytest.mark.parametrize("kind", [SegmentProgress, Tally])
def test_records_and_views_have_every_counter(kind: type[SegmentCounters]) -> None:
    assert {field.name for field in fields(kind)} >= set(SEGMENT_COUNTERS)


@pytest.mark.parametrize("row", [SegmentRow, RollupRow])
def test_tables_have_a_column_for_every_counter_that_may_be_added_to_old_rows(row: type[Base]) -> None:
    table = row.__table__
    assert isinstance(table, Table)
    for field in fields(SegmentCounters):
        column = table.columns[field.name]
        assert column.type.python_type is field.type
        assert not column.nullable
        assert column.server_default is not None
