"""Metrics of a device: what the status page tells, as Prometheus reads it."""

import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.testclient import TestClient

from fleet_device.api.app import create_app
from fleet_device.api.status import DEVICE_CATALOGUE, device_families, metrics_route
from fleet_edge.metrics.catalogue import CATALOGUE
from tests.support.device_status import device_status
from tests.support.memory_device import settings


class Told:
    """A backend of which only the status is asked."""

    def status(self) -> dict[str, object]:
        return device_status()


def test_the_text_is_what_prometheus_reads() -> None:
    client = TestClient(Starlette(routes=[metrics_route(device_status)]))
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    assert {sample.name: sample.value for sample in samples} == {
        "dssd_device_info": 1.0,
        "dssd_device_ready": 1.0,
        "dssd_device_broker_connected": 1.0,
        "dssd_device_texts_writing": 1.0,
        "dssd_device_texts_waiting": 2.0,
        "dssd_device_sessions_total": 3.0,
        "dssd_device_tokens_total": 1234.0,
        "dssd_device_unverified_tokens_total": 0.0,
        "dssd_device_acceptance_ratio": 0.815,
        "dssd_device_draft_tokens_mean": 4.25,
        "dssd_device_round_trip_seconds": pytest.approx(0.0417),
        "dssd_device_draft_token_seconds": pytest.approx(0.0113),
    }
    assert samples[0].labels == {"version": "9.9", "draft_model": "toy", "quantization": "Q4_0"}


def test_what_is_not_known_yet_is_left_out_and_who_cannot_write_is_not_ready() -> None:
    rates = dict.fromkeys(("acceptance", "mean_draft", "round_trip_ms", "draft_ms_per_token"))
    found = {each.metric.name: each for each in device_families(device_status(status="waiting", **rates))}
    assert "dssd_device_acceptance_ratio" not in found
    assert found["dssd_device_ready"].values == {(): 0.0}


def test_every_metric_of_the_catalogue_is_told_under_a_name_of_its_own() -> None:
    assert {each.metric for each in device_families(device_status())} == set(DEVICE_CATALOGUE)
    assert not {each.name for each in DEVICE_CATALOGUE} & {each.name for each in CATALOGUE}


def test_without_the_library_it_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    app = create_app(Told(), settings())  # type: ignore[arg-type]
    answer = TestClient(app, base_url="http://127.0.0.1").get("/metrics")
    assert answer.status_code == 501
    assert "extra 'metrics'" in answer.json()["error"]["message"]


def test_it_is_guarded_as_all_of_the_api_is() -> None:
    app = create_app(Told(), settings(api_token="s3cret-s3cret"))  # type: ignore[arg-type]
    client = TestClient(app, base_url="http://127.0.0.1")
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"Authorization": "Bearer s3cret-s3cret"}).status_code == 200
    assert TestClient(app, base_url="http://evil.example").get("/metrics").status_code == 421
