"""Metrics of a device for Prometheus, at `/metrics` of its local API, where `prometheus-client` is installed.

What they tell is what the status page tells. One endpoint is one device, so no metric has a label for it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fleet_common.metrics.errors import MetricsUnavailable
from fleet_common.metrics.exposition import CONTENT_TYPE, exposition
from fleet_common.metrics.family import PREFIX, Family, Kind, Metric
from fleet_device.api.problems import ApiProblem


def _metric(name: str, kind: Kind, meaning: str, *labels: str) -> Metric:
    return Metric(f"{PREFIX}device_{name}", kind, meaning, labels)


INFO: Final = _metric(
    "info", Kind.GAUGE, "Software and draft model; the value is always 1.", "version", "draft_model", "quantization"
)
READY: Final = _metric("ready", Kind.GAUGE, "Whether a text can be written now (1) or not (0).")
BROKER_UP: Final = _metric("broker_connected", Kind.GAUGE, "Whether the broker answers (1) or not (0).")
WRITING: Final = _metric("texts_writing", Kind.GAUGE, "Texts that are being written.")
WAITING: Final = _metric("texts_waiting", Kind.GAUGE, "Texts that wait for their turn.")
SESSIONS: Final = _metric("sessions_total", Kind.COUNTER, "Texts that have ended.")
TOKENS: Final = _metric("tokens_total", Kind.COUNTER, "Tokens of these.")
UNVERIFIED: Final = _metric("unverified_tokens_total", Kind.COUNTER, "Of these, those that no edge has verified.")
ACCEPTANCE: Final = _metric("acceptance_ratio", Kind.GAUGE, "Accepted of tested draft tokens since the start.")
MEAN_DRAFT: Final = _metric("draft_tokens_mean", Kind.GAUGE, "Mean number of tokens in a draft since the start.")
ROUND_TRIP: Final = _metric("round_trip_seconds", Kind.GAUGE, "From a draft to its verdict, smoothed.")
DRAFT_TIME: Final = _metric("draft_token_seconds", Kind.GAUGE, "Mean time of a draft token.")

DEVICE_CATALOGUE: Final = tuple(each for each in list(globals().values()) if isinstance(each, Metric))
"""All metrics of a device, in the order above."""


def device_families(status: Mapping[str, Any]) -> Iterator[Family]:
    """Yield the metrics of a device.

    Args:
        status: As the status page has it. What is None there is left out: it is not known yet.
    """
    drafter, sessions = status["drafter"], status["sessions"]
    yield Family(INFO, {(status["software"], drafter["name"], drafter["quantization"]): 1.0})
    yield READY.of(status["status"] in {"ok", "local"})
    yield BROKER_UP.of(status["broker"]["connected"])
    yield WRITING.of(sessions["writing"])
    yield WAITING.of(sessions["waiting"])
    yield SESSIONS.of(sessions["ended"])
    yield TOKENS.of(sessions["tokens"])
    yield UNVERIFIED.of(status["unverified"])
    rates = (
        (ACCEPTANCE, "acceptance", 1.0),
        (MEAN_DRAFT, "mean_draft", 1.0),
        (ROUND_TRIP, "round_trip_ms", 1e-3),
        (DRAFT_TIME, "draft_ms_per_token", 1e-3),
    )
    for metric, name, scale in rates:
        if status[name] is not None:
            yield metric.of(status[name] * scale)


def metrics_route(status: Callable[[], Mapping[str, Any]]) -> Route:
    """Return the route of the metrics.

    Args:
        status: Returns how the device is, as JSON values; does not block.
    """

    async def metrics(_request: Request) -> Response:
        try:
            text = exposition(device_families(status()))
        except MetricsUnavailable:
            sentence = "Metrics need the package 'prometheus-client': install this one with the extra 'metrics'."
            raise ApiProblem(501, sentence, code="metrics_unavailable") from None
        return Response(text, media_type=CONTENT_TYPE, headers={"Cache-Control": "no-store"})

    return Route("/metrics", metrics)
