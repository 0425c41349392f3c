"""Exposition: metric families as Prometheus reads them."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from fleet_common.metrics.errors import MetricsUnavailable
from fleet_common.metrics.family import Family, Kind

if TYPE_CHECKING:
    from prometheus_client.core import Metric as PrometheusMetric

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def require_library() -> None:
    """Check that the library is there, before somebody waits for what it makes.

    Raises:
        MetricsUnavailable: It is not.
    """
    try:
        import prometheus_client  # noqa: F401, PLC0415 - optional
    except ModuleNotFoundError as error:
        raise MetricsUnavailable(
            "Metrics need the package 'prometheus-client': install this one with the extra 'metrics', or leave "
            "`metrics.listen` out."
        ) from error


def exposition(families: Iterable[Family]) -> bytes:
    """Return the families in Prometheus's text format.

    Raises:
        MetricsUnavailable: The library is missing.
    """
    require_library()
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415 - optional
    from prometheus_client.registry import Collector  # noqa: PLC0415 - likewise

    class _Once(Collector):
        def collect(self) -> Iterator["PrometheusMetric"]:
            return map(_translated, families)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once())
    return generate_latest(registry)


def _translated(family: Family) -> "PrometheusMetric":
    from prometheus_client.core import (  # noqa: PLC0415 - optional
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    metric = family.metric
    if family.histogram is not None:
        spread = HistogramMetricFamily(metric.name, metric.meaning)
        spread.add_metric([], buckets=list(family.buckets()), sum_value=family.histogram.total)
        return spread
    kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    simple = kind(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in family.values.items():
        simple.add_metric(labels, value)
    return simple
