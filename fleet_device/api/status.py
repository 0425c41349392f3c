"""Status page at `/`, its JSON, and metrics for Prometheus at `/metrics` (needs `prometheus-client`).

The page is plain HTML without scripts that works without a network; all that it shows is escaped. Its policy lets the
browser load, run and send nothing, and no other page frame this one, so that a name or a text that got through the
escaping could do nothing either.
"""

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Final

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fleet_common.metrics import CONTENT_TYPE, PREFIX, Family, Metric, MetricKind, MetricsUnavailable, exposition
from fleet_device.api.problems import ApiProblem
from fleet_device.settings import OfflinePolicy
from schemas.printable import printable

REFRESH_S: Final = 5
"""Seconds after which a browser reloads the page."""

_OFFLINE: Final[Mapping[str, str]] = {
    OfflinePolicy.FAIL: "texts fail",
    OfflinePolicy.WAIT: "texts wait",
    OfflinePolicy.LOCAL: "the draft model goes on alone, unverified",
}

_TO_THE_MINUTE: Final = 16  # characters

_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def status_routes(status: Callable[[], Mapping[str, Any]]) -> list[Route]:
    async def page(_request: Request) -> Response:
        policy = {"Content-Security-Policy": _policy()}
        return HTMLResponse(render_status(status()), headers={**_HEADERS, **policy})

    async def json(_request: Request) -> Response:
        return JSONResponse(dict(status()), headers=_HEADERS)

    return [Route("/", page), Route("/status", json)]


def render_status(status: Mapping[str, Any]) -> str:
    readable = _readable(status)
    return _template().render(
        status=readable,
        offline=_OFFLINE.get(readable["offline"], readable["offline"]),
        style=Markup(_file("status.css")),  # noqa: S704 - ours
        refresh_s=REFRESH_S,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": _figure, "moment": _moment, "number": _number}
    return environment.from_string(_file("status.html"))


@cache
def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(_file("status.css").encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@cache
def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _figure(value: float | None, digits: int, unit: str) -> str:
    return "not measured yet" if value is None else f"{value:,.{digits}f} {unit}"


def _number(value: int, what: str) -> str:
    return f"{value:,} {what}{'s' * (value != 1)}"


def _moment(time: str) -> str:
    return time[:_TO_THE_MINUTE].replace("T", " ")


def _readable(value: Any) -> Any:  # noqa: ANN401 - JSON values
    """Replace characters that could make a text look different: control characters and writing direction marks."""
    match value:
        case str():
            return printable(value)
        case Mapping():
            return {key: _readable(each) for key, each in value.items()}
        case list() | tuple():
            return [_readable(each) for each in value]
        case _:
            return value


def _metric(name: str, kind: MetricKind, meaning: str, *labels: str) -> Metric:
    return Metric(f"{PREFIX}device_{name}", kind, meaning, labels)


INFO: Final = _metric(
    "info",
    MetricKind.GAUGE,
    "Software and draft model; the value is always 1.",
    "version",
    "draft_model",
    "quantization",
)
READY: Final = _metric("ready", MetricKind.GAUGE, "Whether a text can be written now (1) or not (0).")
BROKER_UP: Final = _metric("broker_connected", MetricKind.GAUGE, "Whether the broker answers (1) or not (0).")
WRITING: Final = _metric("texts_writing", MetricKind.GAUGE, "Texts that are being written.")
WAITING: Final = _metric("texts_waiting", MetricKind.GAUGE, "Texts that wait for their turn.")
SESSIONS: Final = _metric("sessions_total", MetricKind.COUNTER, "Texts that have ended.")
TOKENS: Final = _metric("tokens_total", MetricKind.COUNTER, "Tokens of these.")
UNVERIFIED: Final = _metric("unverified_tokens_total", MetricKind.COUNTER, "Of these, those that no edge has verified.")
ACCEPTANCE: Final = _metric("acceptance_ratio", MetricKind.GAUGE, "Accepted of tested draft tokens since the start.")
MEAN_DRAFT: Final = _metric("draft_tokens_mean", MetricKind.GAUGE, "Mean number of tokens in a draft since the start.")
ROUND_TRIP: Final = _metric("round_trip_seconds", MetricKind.GAUGE, "From a draft to its verdict, smoothed.")
DRAFT_TIME: Final = _metric("draft_token_seconds", MetricKind.GAUGE, "Mean time of a draft token.")

DEVICE_CATALOGUE: Final = tuple(each for each in list(globals().values()) if isinstance(each, Metric))


def device_families(status: Mapping[str, Any]) -> Iterator[Family]:
    """Yield the metrics of a device; a value of None in the status is unknown, and left out."""
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
    async def metrics(_request: Request) -> Response:
        try:
            text = exposition(device_families(status()))
        except MetricsUnavailable:
            sentence = "Metrics need the package 'prometheus-client': install this one with the extra 'metrics'."
            raise ApiProblem(501, sentence, code="metrics_unavailable") from None
        return Response(text, media_type=CONTENT_TYPE, headers={"Cache-Control": "no-store"})

    return Route("/metrics", metrics)
