import http.client
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fleet_device.drafters.llama_cpp import LlamaCppDrafter
from fleet_device.requests.generate import GenerateRequest, RequestContext
from fleet_edge.service import EdgeService
from schemas.policy import Mode, SamplingPolicy
from tests.support.whole import Whole

pytestmark = [pytest.mark.broker, pytest.mark.models]

LENGTH = 24
PROMPT = (504, 314, 260, 6376, 4461, 47)  # any ids will do


def scrape(edge: EdgeService) -> dict[str, float]:
    assert edge.metrics is not None
    connection = http.client.HTTPConnection(edge.metrics.url.removeprefix("http://"), timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {"".join([sample.name, *sorted(sample.labels.values())]): sample.value for sample in samples}


def test_what_is_scraped_is_what_was_written(whole: Whole, drafters: Callable[[str], LlamaCppDrafter]) -> None:
    whole.options["metrics"] = {"listen": "127.0.0.1:0"}
    during: list[dict[str, float]] = []
    policy = SamplingPolicy(mode=Mode.COUPLED, temperature=0.8, top_k=50, top_p=0.95, seed=3)
    with whole.edge() as edge, whole.device(drafters("Q4_0"), stream=False, draft_length=4) as device:
        done = device.agent.generate(
            GenerateRequest(PROMPT, policy=policy, max_new_tokens=LENGTH),
            RequestContext(on_tokens=lambda _tokens: during.append(scrape(edge))),
        )
        after = scrape(edge)
    written = len(done.tokens)
    assert after["dssd_generation_tokens_totaldraft"] == written > 0
    assert after["dssd_spec_decode_num_accepted_tokens_total"] == done.counters.accepted
    assert after["dssd_link_round_trip_seconds_count"] >= 1
    assert after["dssd_prefill_tokens_total"] >= len(PROMPT) - 1
    assert 0.0 < max(each["dssd_kv_cache_usage_ratio"] for each in during) <= 1.0
    assert max(each["dssd_num_requests_running"] for each in during) == 1
    rising = [each["dssd_generation_tokens_totaldraft"] for each in during]
    assert rising == sorted(rising)
