"""Metric families and their text, as Prometheus's own parser reads it."""

from prometheus_client.parser import text_string_to_metric_families

from fleet_common.metrics.exposition import exposition
from fleet_common.metrics.family import Family, Histogram, Kind, Metric


def test_a_histogram_counts_up_to_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    histogram.observe(2.0, 3)
    assert histogram.counts == [2, 4, 1]
    assert histogram.total == 18.0
    spread = Metric("dssd_x_seconds", Kind.HISTOGRAM, "Some.").spread(histogram)
    assert list(spread.buckets()) == [("1", 2), ("2", 6), ("+Inf", 7)]


def test_a_quantile_is_a_bound_of_what_came_since() -> None:
    histogram = Histogram((1.0, 2.0, 4.0))
    assert histogram.quantile(0.95) is None
    histogram.observe(0.5, 100)
    before = list(histogram.counts)
    histogram.observe(1.5, 94)
    histogram.observe(3.0, 6)
    assert histogram.quantile(0.95, since=before) == 4.0
    assert histogram.quantile(0.94, since=before) == 2.0
    assert histogram.quantile(0.5) == 1.0
    histogram.observe(9.0, 10_000)
    assert histogram.quantile(0.95) == float("inf")


def test_the_text_is_what_prometheus_reads() -> None:
    histogram = Histogram((0.1,))
    histogram.observe(0.05)
    hostile = 'a"b\\c\nd'
    families = [
        Metric("dssd_faults_total", Kind.COUNTER, "Faults.", ("code",)).by({"quota": 2, hostile: 1}),
        Metric("dssd_sessions", Kind.GAUGE, "Open sessions.").of(3),
        Metric("dssd_step_seconds", Kind.HISTOGRAM, "Steps.").spread(histogram),
        Family(Metric("dssd_info", Kind.GAUGE, "It.", ("a", "b")), {("x", "y"): 1.0}),
    ]
    read = {each.name: each for each in text_string_to_metric_families(exposition(families).decode())}
    assert {name: each.type for name, each in read.items()} == {
        "dssd_faults": "counter",
        "dssd_sessions": "gauge",
        "dssd_step_seconds": "histogram",
        "dssd_info": "gauge",
    }
    assert {sample.labels["code"]: sample.value for sample in read["dssd_faults"].samples} == {"quota": 2, hostile: 1}
    assert {(s.name, s.labels.get("le")): s.value for s in read["dssd_step_seconds"].samples} == {
        ("dssd_step_seconds_bucket", "0.1"): 1,
        ("dssd_step_seconds_bucket", "+Inf"): 1,
        ("dssd_step_seconds_count", None): 1,
        ("dssd_step_seconds_sum", None): 0.05,
    }
    assert read["dssd_info"].samples[0].labels == {"a": "x", "b": "y"}
