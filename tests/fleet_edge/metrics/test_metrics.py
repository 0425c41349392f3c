import json
import re
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fleet_common.mqtt.link import Message
from fleet_device.requests.generate import GenerateRequest, RequestContext
from fleet_edge.metrics import CATALOGUE
from schemas.topics import Topic, build
from tests.fleet_common.test_metrics import ask as ask_port
from tests.support.memory_edges import LENGTH, POLICY, PROMPT, RunningEdge, Site
from tests.support.memory_fleet import FLEET
from tests.support.memory_link import MemoryLink
from tests.support.waiting import PATIENCE_S, until

LISTEN = {"metrics": {"listen": "127.0.0.1:0"}}
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def ask(edge: RunningEdge, path: str) -> tuple[int, str]:
    return ask_port(int(edge.service.metrics.address.rpartition(":")[2]), path)


def scrape(edge: RunningEdge) -> Samples:
    status, text = ask(edge, "/metrics")
    assert status == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples["dssd_" + name, tuple(sorted(labels.items()))]


def test_what_a_text_came_to_is_what_the_log_says(site: Site) -> None:
    with site.edge(**LISTEN) as edge, site.device(edge_only=False) as device:
        before, during = scrape(edge), list[Samples]()
        done = device.agent.generate(
            GenerateRequest(PROMPT, policy=POLICY, max_new_tokens=LENGTH),
            RequestContext(on_tokens=lambda _tokens: during.append(scrape(edge))),
        )
        until(lambda: site.rows("SELECT reason FROM sessions") == [{"reason": "length"}])
        after = scrape(edge)
    (row,) = site.rows("SELECT * FROM segments")
    assert of(before, "num_requests_running") == 0
    assert max(of(each, "num_requests_running") for each in during) == 1
    assert 0.0 < max(of(each, "kv_cache_usage_ratio") for each in during) <= 1.0
    assert of(after, "spec_decode_num_accepted_tokens_total") == row["accepted"] == done.counters.accepted > 0
    assert of(after, "spec_decode_num_tested_tokens_total") == row["tested"]
    drafts = of(after, "spec_decode_num_drafts_total")
    assert 0 < drafts <= row["rounds"]
    places = [
        value for (name, _), value in after.items() if name == "dssd_spec_decode_num_accepted_tokens_per_pos_total"
    ]
    assert sum(places) == row["accepted"]
    assert places == sorted(places, reverse=True)
    assert of(after, "generation_tokens_total", plan="draft") == LENGTH
    assert of(after, "generation_tokens_total", plan="edge-only") == 0
    assert of(after, "prompt_tokens_total") == len(PROMPT)
    assert of(after, "request_success_total", reason="length") == 1
    assert of(after, "request_success_total", reason="failed") == 0
    assert of(after, "time_to_first_token_seconds_count") == 1
    assert of(after, "inter_token_latency_seconds_count") < LENGTH
    assert of(after, "request_queue_time_seconds_count") == row["rounds"]
    assert of(after, "batch_sessions_count") <= of(after, "step_seconds_count")
    forms = [value for (name, _), value in after.items() if name == "dssd_downlink_bytes_total"]
    assert sum(forms) > row["downlink_bytes"]  # the replies too
    assert of(after, "uplink_bytes_total") > row["uplink_bytes"]
    assert of(after, "broker_connected") == 1
    assert of(after, "devices", state="online") == 1


def test_what_the_edge_writes_by_itself_is_told_apart(site: Site) -> None:
    with site.edge(**LISTEN) as edge, site.device(edge_only=True) as device:
        device.agent.generate(GenerateRequest(PROMPT, policy=POLICY, max_new_tokens=LENGTH))
        after = scrape(edge)
    assert of(after, "generation_tokens_total", plan="edge-only") == LENGTH
    assert of(after, "spec_decode_num_drafts_total") == 0
    assert of(after, "downlink_bytes_total", form="written") > 0


def test_faults_and_refusals_are_counted_by_code_from_nought(site: Site) -> None:
    with site.edge(**LISTEN) as edge:
        link = MemoryLink(site.broker, "hostile")
        answers: list[Message] = []
        link.subscribe(build(Topic.SESSION, fleet=FLEET, device="hostile"), answers.append)
        link.start(timeout_s=1.0)
        assert of(scrape(edge), "faults_total", code="malformed") == 0
        link.publish(build(Topic.OPEN, fleet=FLEET, device="hostile"), b"nonsense")
        until(lambda: bool(answers))
        assert of(scrape(edge), "faults_total", code="malformed") == 1
        assert of(scrape(edge), "refusals_total", code="busy") == 0


def test_an_edge_is_ready_until_it_drains_or_its_log_is_stuck(site: Site) -> None:
    with site.edge(**LISTEN) as edge:
        assert ask(edge, "/healthz")[0] == 200
        assert ask(edge, "/readyz")[0] == 200
        edge.service.writer._stuck = True
        edge.service.orchestrator.handlers.draining = True
        status, body = ask(edge, "/readyz")
        edge.service.writer._stuck = False
    assert status == 503
    failing = {name: said for name, said in json.loads(body)["checks"].items() if said != "ok"}
    assert failing == {
        "session_log": "Neither the database nor the spool takes records.",
        "draining": "The edge takes no new sessions.",
    }


def test_a_loop_that_hangs_is_neither_alive_nor_ready_and_still_measured(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site.edge(**LISTEN) as edge:
        service, go_on = edge.service, threading.Event()
        seen = service.observer()
        monkeypatch.setattr("fleet_edge.observer._ANSWER_S", 0.05)
        service.orchestrator.inbox.put(lambda: bool(go_on.wait(PATIENCE_S)) and None)
        try:
            assert not seen.alive().well
            assert [*seen.ready().checks] == ["loop"]
            assert not seen.ready().well
            names = {metric.name for metric in seen.metrics()}
        finally:
            go_on.set()
            monkeypatch.undo()
        assert seen.alive().well
    assert "dssd_broker_connected" in names
    assert "dssd_num_requests_running" not in names


def test_every_metric_of_the_catalogue_is_served(site: Site) -> None:
    with site.edge(**LISTEN) as edge, site.device() as device:
        device.agent.generate(GenerateRequest(PROMPT, policy=POLICY, max_new_tokens=LENGTH))
        edge.service.observer().loop_state()
        served = {metric.name for metric in edge.service.observer().metrics()}
    assert served == {metric.name.removesuffix("_total") for metric in CATALOGUE}


def test_the_page_names_metrics_that_there_are() -> None:
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(dssd_\w+)`", page)) <= {each.name for each in CATALOGUE}
