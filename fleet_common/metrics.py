"""Metrics for Prometheus: their definitions and values, and where an endpoint serves them (`metrics_server`).

A counter is a number, a histogram a list of numbers. prometheus-client, which edges have, is imported when they are
read.
"""

import ipaddress
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from fleet_common.settings import setting
from schemas.errors import FleetError

if TYPE_CHECKING:
    from prometheus_client.core import Metric as PrometheusMetric

_log = logging.getLogger(__name__)


class MetricsError(FleetError):
    """The metrics endpoint cannot serve. The message is one sentence for the user."""


PREFIX: Final = "dssd_"


class MetricKind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """Definition of a metric.

    Attributes:
        name: With the prefix; a counter's ends in `_total`.
        labels: Label names. Labels have few values: no devices, no sessions.
    """

    name: str
    kind: MetricKind
    meaning: str
    labels: tuple[str, ...] = ()

    def of(self, value: float, *labels: str) -> "PrometheusMetric":
        return self._with({labels: value})

    def by(self, values: Mapping[str, float]) -> "PrometheusMetric":
        """Return the values of a metric with one label."""
        return self._with({(label,): value for label, value in sorted(values.items())})

    def _with(self, values: Mapping[tuple[str, ...], float]) -> "PrometheusMetric":
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415 - see above

        kind = CounterMetricFamily if self.kind is MetricKind.COUNTER else GaugeMetricFamily
        found = kind(self.name, self.meaning, labels=self.labels)
        for labels, value in values.items():
            found.add_metric(labels, value)
        return found

    def spread(self, histogram: "Histogram") -> "PrometheusMetric":
        from prometheus_client.core import HistogramMetricFamily  # noqa: PLC0415 - see above

        return HistogramMetricFamily(
            self.name, self.meaning, buckets=list(histogram.buckets()), sum_value=histogram.total
        )


@dataclass(slots=True)
class Histogram:
    """Histogram. One thread observes, any may read.

    `bounds` are the upper bounds of the buckets, ascending; the last bucket has none.
    """

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def quantile(self, share: float, *, since: Sequence[int] = ()) -> float | None:
        """Return a bucket's bound above a quantile: infinite in the last bucket, None without observations.

        `share` is from 0 to 1; only observations after the counts `since` matter.
        """
        before = since or [0] * len(self.counts)
        counts = [now - then for now, then in zip(list(self.counts), before, strict=True)]
        wanted, seen = share * sum(counts), 0
        if not sum(counts):
            return None
        for bound, count in zip([*self.bounds, float("inf")], counts, strict=True):
            seen += count
            if seen >= wanted and count:
                return bound
        return float("inf")

    def buckets(self) -> Iterator[tuple[str, float]]:
        """Yield upper bounds, as text, and the cumulative counts."""
        seen = 0
        for bound, count in zip([*self.bounds, float("inf")], list(self.counts), strict=True):
            seen += count
            yield ("+Inf" if bound == float("inf") else f"{bound:g}"), seen


CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def exposition(metrics: Iterable["PrometheusMetric"]) -> bytes:
    """Return metrics in Prometheus's text format."""
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415 - see above
    from prometheus_client.registry import Collector  # noqa: PLC0415 - see above

    class _Once(Collector):
        def collect(self) -> Iterable["PrometheusMetric"]:
            return metrics

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once())
    return generate_latest(registry)


_MIN_TOKEN: Final = 16
_MAX_TOKEN: Final = 4096
_MAX_PORT: Final = 65_535


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Address to listen on; `host` is an IP address or `localhost`, `port` 0 is any free port."""

    host: str
    port: int

    @classmethod
    def read(cls, text: str) -> "ListenAddress":
        """Read `HOST:PORT`, an IPv6 address in brackets; the message of ValueError ends a sentence."""
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
        if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > _MAX_PORT:
            raise ValueError("it must be an address and a port, such as 127.0.0.1:9464 or [::1]:9464")
        if host != "localhost":
            try:
                ipaddress.ip_address(host)
            except ValueError:
                raise ValueError(f"{host[:60]!r} is no IP address; 0.0.0.0 listens on all of this machine's") from None
        return cls(host, int(port))

    @property
    def loopback(self) -> bool:
        return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback


class MetricsSettings(BaseModel):
    """Where metrics, `/healthz` and `/readyz` are served, and who may read them."""

    model_config = ConfigDict(extra="forbid")

    listen: str = setting(
        "",
        "Address and port of `/metrics`, `/healthz` and `/readyz`, such as `127.0.0.1:9464`; beyond loopback only "
        "with `metrics.token_file`. Empty for none.",
        rare=True,
        in_flags=False,
    )
    token_file: Path | None = setting(
        None, "File with the bearer token for reading metrics.", rare=True, in_flags=False
    )

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, text: str) -> str:
        if text:
            ListenAddress.read(text)
        return text

    @model_validator(mode="after")
    def _check_token(self) -> Self:
        if self.address is not None and not self.address.loopback and self.token_file is None:
            raise ValueError(
                "beyond loopback metrics need a bearer token: name its file in 'metrics.token_file', or listen on "
                "127.0.0.1"
            )
        return self

    @property
    def address(self) -> ListenAddress | None:
        return ListenAddress.read(self.listen) if self.listen else None

    def token(self) -> bytes | None:
        """Read the bearer token, None if none is required; raise MetricsError if its file is unusable."""
        return None if self.token_file is None else read_token(self.token_file.expanduser())


def read_token(path: Path) -> bytes:
    """Read a token file; raise MetricsError if it cannot be read or holds no token."""
    try:
        with path.open("rb") as file:
            token = file.read(_MAX_TOKEN + 1).strip()
    except OSError as error:
        raise MetricsError(f"The token's file {path} cannot be read ({error.strerror}).") from error
    if not _MIN_TOKEN <= len(token) <= _MAX_TOKEN or not all(33 <= byte < 127 for byte in token):  # noqa: PLR2004
        raise MetricsError(
            f"The token in {path} must be {_MIN_TOKEN} to {_MAX_TOKEN} printable characters without spaces: make "
            "one with `openssl rand -hex 32`."
        )
    return token


@dataclass(frozen=True, slots=True)
class Health:
    """Result of a health check: a sentence for each failed check, an empty string for others."""

    checks: Mapping[str, str]

    @property
    def well(self) -> bool:
        return not any(self.checks.values())


@dataclass(frozen=True, slots=True)
class MetricsPages:
    """Content of the endpoint. Called on its threads, several at a time.

    A program that is not `alive` should be restarted; one that is not `ready` accepts no work.
    """

    metrics: Callable[[], bytes]
    alive: Callable[[], Health]
    ready: Callable[[], Health]
