from fleet_device.gateway import Gateway
from fleet_device.requests.generate import GeneratedText, GenerateRequest
from fleet_device.requests.queue import Failed
from schemas.policy import SamplingPolicy
from tests.support.memory_device import announce_edge, at_work, memory_service
from tests.support.memory_fleet import MemoryFleet
from tests.support.waiting import until


def test_a_gateway_s_status_has_what_its_texts_have_shown() -> None:
    fleet = MemoryFleet()
    announce_edge(fleet)
    with at_work(fleet):
        served = Gateway(memory_service(fleet, draft_length=4))
        assert served.status()["acceptance"] is None
        served.start()
        until(lambda: served.absence() is None)
        events: list[object] = []
        request = GenerateRequest((1, 2), SamplingPolicy(seed=1), 8)
        served.submit(lambda _codec: request, events.append)
        until(lambda: any(isinstance(each, GeneratedText | Failed) for each in events))
        status = served.status()
        served.stop()
    (written,) = [each for each in events if isinstance(each, GeneratedText)]
    assert status["sessions"]["tokens"] == len(written.tokens)
    assert (status["plan"], status["status"], status["device"]) == ("draft", "ok", "device-1")
    assert 0.0 <= status["acceptance"] <= 1.0
    assert status["plan_reason"]


def test_the_target_of_the_settings_is_never_any_name() -> None:
    fleet = MemoryFleet()
    announce_edge(fleet)
    with at_work(fleet):
        served = Gateway(memory_service(fleet, target="large"))
        served.start()
        until(lambda: served.absence() is None)
        request = GenerateRequest((1, 2), SamplingPolicy(seed=1), 2)
        ended: list[object] = []
        for target in ("large", "any other"):
            served.submit(lambda _codec: request, ended.append, target=target)
        until(lambda: len([each for each in ended if isinstance(each, GeneratedText | Failed)]) == 2)
        served.stop()
    refused, written = (each for each in ended if isinstance(each, GeneratedText | Failed))
    assert isinstance(refused, Failed)
    assert getattr(refused.error, "code", "") == "model_not_found"
    assert isinstance(written, GeneratedText)
