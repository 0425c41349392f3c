import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fleet_device.requests.generate import GenerateRequest
from fleet_edge.metrics.tracing import Tracing
from tests.support.memory_edges import LENGTH, POLICY, PROMPT, Site
from tests.support.waiting import until


def test_a_session_and_its_steps_are_spans(site: Site) -> None:
    spans = InMemorySpanExporter()
    with site.edge() as edge, site.device(stream=False) as device:
        tracing = Tracing.start(fleet="north", edge="edge-1", target="scripted", exporter=spans)
        edge.service.orchestrator.answers.figures.tracing = tracing
        device.agent.generate(GenerateRequest(PROMPT, policy=POLICY, max_new_tokens=LENGTH))
        until(lambda: site.rows("SELECT reason FROM sessions") == [{"reason": "length"}])
    found = spans.get_finished_spans()
    (session,) = [span for span in found if span.name == "session"]
    steps = [span for span in found if span.name == "step"]
    assert session.attributes["gen_ai.usage.output_tokens"] == LENGTH
    assert session.attributes["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert session.attributes["gen_ai.response.finish_reasons"] == "length"
    assert session.attributes["dssd.device"] == "device-1"
    assert session.resource.attributes["service.name"] == "fleet-edge"
    assert session.resource.attributes["dssd.fleet"] == "north"
    (row,) = site.rows("SELECT rounds FROM segments")
    assert session.attributes["dssd.rounds"] == row["rounds"]
    # A step may verify two consecutive drafts of a request; each token is computed except the last.
    computed = [span.attributes["dssd.batch_tokens"] for span in steps if span.attributes is not None]
    assert sum(tokens for tokens in computed if isinstance(tokens, int)) >= len(PROMPT) + LENGTH - 1
    assert all(span.start_time <= span.end_time for span in found)


def test_a_span_lasts_as_long_as_what_it_tells_of() -> None:
    spans = InMemorySpanExporter()
    tracing = Tracing.start(fleet="north", edge="edge-1", target="scripted", exporter=spans)
    Tracing(tracing.provider, "scripted", now_ns=lambda: 5_000_000_000).step(0.25, sessions=3, tokens=12)
    tracing.stop()
    (span,) = spans.get_finished_spans()
    assert (span.start_time, span.end_time) == (4_750_000_000, 5_000_000_000)
    assert span.attributes == {"dssd.batch_sessions": 3, "dssd.batch_tokens": 12}


@pytest.mark.slow
def test_a_collector_that_is_away_keeps_no_edge_from_ending(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with site.edge(), site.device() as device:
        done = device.agent.generate(GenerateRequest(PROMPT, policy=POLICY, max_new_tokens=LENGTH))
    assert len(done.tokens) == LENGTH
