"""Traces of an edge for OpenTelemetry: a span for each session and for each step.

Sent by OTLP over HTTP, configured by OpenTelemetry's own variables (`OTEL_EXPORTER_OTLP_ENDPOINT`,
`OTEL_TRACES_SAMPLER`, …). A span is made when its session or step is over, and passed to a thread that sends in
batches: an edge does not wait for a collector, and loses spans rather than time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fleet_common.metrics import MetricsUnavailable
from fleet_edge.sessions.machine import EdgeSession
from schemas.names import VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

COLLECTORS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""OpenTelemetry's variables that name a collector; an edge sends traces if one is set."""

_SHUTDOWN_MS: Final = 2000
_NANOSECONDS: Final = 1e9


@dataclass(frozen=True, slots=True)
class Tracing:
    """Makes spans, on the orchestrator's thread."""

    provider: "TracerProvider"
    target: str
    now_ns: Callable[[], int] = time.time_ns

    @classmethod
    def start(cls, *, fleet: str, edge: str, target: str, exporter: "SpanExporter | None" = None) -> "Tracing":
        """Begin to send to `exporter`; by default OTLP over HTTP. Raises `MetricsUnavailable` without the library."""
        try:
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - optional
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - likewise
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - likewise

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - likewise
                    OTLPSpanExporter,
                )

                exporter = OTLPSpanExporter()
        except ModuleNotFoundError as error:
            raise MetricsUnavailable(
                f"Traces need the package {error.name!r}: install this one with the extra 'otel', or unset "
                f"{' and '.join(COLLECTORS)}."
            ) from error
        named = {"service.name": "fleet-edge", "service.version": VERSION, "service.instance.id": edge}
        provider = TracerProvider(resource=Resource.create({**named, "dssd.fleet": fleet}), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider, target)

    def session(self, session: EdgeSession, *, reason: str, seconds: float) -> None:
        """Report a session that has ended, `seconds` after it was opened here."""
        counted = session.counters
        self._span(
            "session",
            seconds,
            {
                "gen_ai.operation.name": "text_completion",
                "gen_ai.request.model": self.target,
                "gen_ai.usage.input_tokens": session.prompt_length,
                "gen_ai.usage.output_tokens": session.committed,
                "gen_ai.response.finish_reasons": reason,
                "dssd.device": session.device,
                "dssd.session": session.session.hex(),
                "dssd.rounds": counted.rounds,
                "dssd.tested_tokens": counted.tested,
                "dssd.accepted_tokens": counted.accepted,
                "dssd.streamed_tokens": counted.streamed,
                "dssd.queue_ms": counted.queue_ms,
                "dssd.compute_ms": counted.compute_ms,
            },
        )

    def step(self, seconds: float, *, sessions: int, tokens: int) -> None:
        self._span("step", seconds, {"dssd.batch_sessions": sessions, "dssd.batch_tokens": tokens})

    def stop(self) -> None:
        """Send what is queued, with a short time limit, and end."""
        self.provider.force_flush(_SHUTDOWN_MS)
        self.provider.shutdown()

    def _span(self, name: str, seconds: float, attributes: dict[str, str | int | float]) -> None:
        ended = self.now_ns()
        started = ended - int(seconds * _NANOSECONDS)
        tracer = self.provider.get_tracer("fleet_edge")
        tracer.start_span(name, attributes=attributes, start_time=started).end(ended)
