from datetime import UTC, datetime, timedelta

from fleet_device.gateway import Journal
from fleet_device.requests.generate import GeneratedText, GenerateRequest, generate_text
from fleet_device.requests.queue import Failed
from schemas.policy import SamplingPolicy
from tests.support.memory_device import ScriptedAgent, TalkingDrafter, announce_edge, at_work, memory_service
from tests.support.memory_fleet import MemoryFleet
from tests.support.waiting import until

REQUEST = GenerateRequest((1, 2), SamplingPolicy(seed=1), 8)


class Now:
    def __init__(self) -> None:
        self.time = datetime(2026, 1, 2, 12, tzinfo=UTC).astimezone()

    def __call__(self) -> datetime:
        return self.time


def text() -> GeneratedText:
    return generate_text(ScriptedAgent(), TalkingDrafter(), REQUEST)


def test_tokens_of_today_begin_anew_at_midnight_and_the_rest_does_not() -> None:
    now = Now()
    journal = Journal(now)
    assert journal.json()["today"]["tokens"] == 0
    assert journal.json()["acceptance"] is None
    journal.note(text())
    journal.note(text())
    found = journal.json()
    assert found["today"] == {"date": now.time.date().isoformat(), "texts": 2, "tokens": 6}
    assert (found["acceptance"], found["mean_draft"]) == (0.75, 4.0)
    now.time += timedelta(days=1)
    found = journal.json()
    assert found["today"] == {"date": now.time.date().isoformat(), "texts": 0, "tokens": 0}
    assert found["acceptance"] == 0.75


def test_a_gateway_s_status_has_what_its_texts_have_shown() -> None:
    from fleet_device.gateway import Gateway  # noqa: PLC0415

    fleet = MemoryFleet()
    announce_edge(fleet)
    with at_work(fleet):
        served = Gateway(memory_service(fleet, draft_length=4))
        served.start()
        until(lambda: served.absence() is None)
        events: list[object] = []
        served.submit(lambda _codec: REQUEST, events.append)
        until(lambda: any(isinstance(each, GeneratedText | Failed) for each in events))
        status = served.status()
        served.stop()
    (written,) = [each for each in events if isinstance(each, GeneratedText)]
    assert status["today"]["tokens"] == len(written.tokens)
    assert (status["plan"], status["status"], status["device"]) == ("draft", "ok", "device-1")
    assert 0.0 <= status["acceptance"] <= 1.0
    assert status["plan_reason"]
