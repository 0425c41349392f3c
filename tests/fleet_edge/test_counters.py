from fleet_edge.counters import SEGMENT_COUNTERS, SegmentCounters

DISTINCT = SegmentCounters(**{name: number for number, name in enumerate(SEGMENT_COUNTERS, start=1)})


def test_sums_are_of_each_counter() -> None:
    both = DISTINCT + DISTINCT
    assert [getattr(both, name) for name in SEGMENT_COUNTERS] == [2 * n for n in range(1, len(SEGMENT_COUNTERS) + 1)]


def test_rates_of_a_step_are_over_the_rounds_that_were_verified() -> None:
    counted = SegmentCounters(rounds=3, resampled=1, batch_sum=9, compute_ms=80.0, queue_ms=6.0, prefill_ms=30.0)
    assert (counted.mean_batch, counted.compute_ms_per_round) == (4.5, 40.0)
    assert (counted.queue_ms_per_round, counted.prefill_ms_per_round) == (2.0, 10.0)
