import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from fleet_common.http_server import HttpServerError
from fleet_common.mqtt.errors import ConnectFailed, LinkFault
from fleet_device.api.listening import listen
from fleet_device.api.problems import problem_of
from fleet_device.drafters.contract import DrafterError
from fleet_device.errors import EdgeUnavailable, TextCancelled
from fleet_device.gateway import Asked, Gateway
from fleet_device.power import HeatSensor
from fleet_device.requests.generate import Cancellation, GenerateRequest, Generation, RequestContext
from fleet_device.service import DeviceService
from fleet_device.settings import OfflinePolicy, Outages
from schemas.control import DeviceState, Presence, decode_json
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason
from schemas.topics import Topic, build
from tests.support.memory_device import TalkingDrafter, announce_edge, at_work, edge_at_work, memory_service, settings
from tests.support.memory_fleet import FLEET, Clock, MemoryFleet
from tests.support.memory_link import MemoryLink
from tests.support.waiting import PATIENCE_S, until

CLIENT = f"{FLEET}:device-1"
STATE = build(Topic.STATE, fleet=FLEET, device="device-1")
REQUEST = GenerateRequest((1, 2), SamplingPolicy(seed=3, temperature=1.0, top_k=0, top_p=1.0), 12)


def coupled(seed: int) -> GenerateRequest:
    return replace(REQUEST, policy=SamplingPolicy(mode=Mode.COUPLED, seed=seed, temperature=0.8, top_k=0, top_p=1.0))


def presence(fleet: MemoryFleet) -> Presence | None:
    kept = fleet.broker.retained(STATE)
    return None if kept is None else decode_json(DeviceState, kept).presence


def test_a_device_says_that_it_is_there_and_that_it_goes() -> None:
    fleet = MemoryFleet()
    service = memory_service(fleet)
    service.start()
    fleet.broker.pump()
    assert presence(fleet) is Presence.ONLINE
    service.drain()
    assert presence(fleet) is Presence.DRAINING
    service.stop()
    assert presence(fleet) is Presence.OFFLINE


def test_a_throttled_device_stops_drafting_says_why_and_drafts_again_when_it_has_cooled(tmp_path: Path) -> None:
    firmware = tmp_path / "devices/platform/soc/soc:firmware/get_throttled"
    firmware.parent.mkdir(parents=True)
    sensor, fleet = HeatSensor(tmp_path), MemoryFleet()
    service = memory_service(fleet, heat=sensor, goal="energy", power={"drafting_w": 7, "idle_w": 3})
    announce_edge(fleet)

    def state() -> DeviceState:
        return decode_json(DeviceState, fleet.broker.retained(STATE) or b"")

    def written(bits: str) -> Generation:
        firmware.write_text(bits)
        for _ in range(6):
            sensor.read()
        return service.generate(replace(REQUEST, max_new_tokens=60)).generation

    with at_work(fleet), service:
        until(lambda: service.absence() is None)
        hot = written("4")
        assert (hot.counters.drafted, hot.counters.edge_only) == (0, len(hot.tokens))
        assert hot.choice is not None
        assert "throttled" in hot.choice.reason
        until(lambda: state().throttled == sensor.throttled)
        cool = written("40000")
        assert cool.counters.drafted > 0
        until(lambda: state().throttled is None)
        assert (cool.joules or 0) > 0
        again = written("4")
        assert again.counters.drafted == 0


def test_a_device_that_vanishes_is_declared_offline_and_comes_back_as_what_it_was() -> None:
    fleet = MemoryFleet()
    service = memory_service(fleet)
    heard: list[bool] = []
    service.link.on_connection(heard.append)
    service.start()
    fleet.broker.pump()
    fleet.broker.kill(CLIENT)
    assert presence(fleet) is Presence.OFFLINE
    fleet.broker.revive(CLIENT)
    fleet.broker.pump()
    assert presence(fleet) is Presence.ONLINE
    assert heard == [True, False, True]
    service.stop()


def test_a_patient_start_waits_for_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet_device.service._AGAIN_S", 0.01)
    fleet = MemoryFleet()
    fleet.broker.up = False
    service = memory_service(fleet)
    service.start_patiently()
    assert not service.link.connected
    fleet.broker.up = True
    until(lambda: service.link.connected)
    service.stop()


def test_a_patient_start_can_be_given_up() -> None:
    fleet, drafter = MemoryFleet(), TalkingDrafter()
    fleet.broker.up = False
    service = memory_service(fleet, drafter)
    service.start_patiently()
    service.stop()
    assert drafter.closed == 1


def code(service: DeviceService) -> str | None:
    missing = service.absence()
    return None if missing is None else missing.code


def test_what_is_missing_to_write_is_said() -> None:
    fleet = MemoryFleet()
    service = memory_service(fleet)
    assert code(service) == LinkFault.UNREACHABLE
    service.start()
    fleet.broker.pump()
    assert code(service) == "edge_unavailable"
    assert service.absence(for_s=3600.0) is None, "it may only be starting"
    announce_edge(fleet)
    fleet.broker.pump()
    assert service.absence() is None
    announce_edge(fleet, Presence.DRAINING)
    fleet.broker.pump()
    assert code(service) == "edge_unavailable"
    service.stop()


@pytest.mark.parametrize("fault", LinkFault)
def test_each_way_to_be_without_a_broker_has_its_code_and_its_health(fault: LinkFault) -> None:
    passing = fault in {LinkFault.UNREACHABLE, LinkFault.BUSY}

    class Away(MemoryLink):
        failure = ConnectFailed("Not now.", fault=fault, refused=fault is not LinkFault.UNREACHABLE)

    fleet = MemoryFleet()
    service = DeviceService(
        settings(), TalkingDrafter(), make_link=lambda link: Away(fleet.broker, link.client_id, will=link.will)
    )
    served = Gateway(service)
    health = served.health()
    assert (health["code"], health["status"]) == (fault, "waiting" if passing else "refused")
    missing = service.absence()
    assert missing is not None
    assert (problem_of(missing).status, problem_of(missing).code) == (503, fault)
    served.stop()


def test_a_text_that_meets_its_stop_string_closes_its_session_with_that_reason() -> None:
    fleet = MemoryFleet()
    announce_edge(fleet)
    with at_work(fleet), memory_service(fleet) as service:
        whole = next(
            text for text in (service.generate(coupled(seed)) for seed in range(100)) if len(text.text.split()) == 12
        )
        assert whole.reason is EndReason.LENGTH
        stop = whole.text.split()[3]
        text = service.generate(replace(whole.request, stop=(stop,)))
    assert text.text == whole.text.partition(stop)[0]
    assert len(text.generation.tokens) < len(whole.generation.tokens)
    assert text.generation.closed.reason is EndReason.STOP
    assert len(fleet.edge.sessions) == 0


def test_a_text_cancelled_before_any_edge_answered_leaves_no_session_open() -> None:
    fleet = MemoryFleet()
    announce_edge(fleet)
    cancellation = Cancellation()
    cancellation.cancel()
    with fleet.broker.running(), memory_service(fleet) as service:
        service.agent.generate(
            GenerateRequest(REQUEST.prompt, policy=REQUEST.policy, max_new_tokens=4),
            RequestContext(cancellation=cancellation),
        )
    fleet.settle()
    assert len(fleet.edge.sessions) == 0


@contextmanager
def gateway(fleet: MemoryFleet, drafter: TalkingDrafter | None = None) -> Iterator[Gateway]:
    """Serve with an edge that is there and verifies nothing; afterwards the gateway has been stopped."""
    announce_edge(fleet)
    with fleet.broker.running():
        served = Gateway(memory_service(fleet, drafter, drain_s=30.0))
        served.start()
        served.serve(listen())
        until(lambda: served.absence() is None)
        yield served
        served.stop()


def begin(served: Gateway) -> list[object]:
    """Begin a text, and return what is heard of it."""
    events: list[object] = []
    served.submit(lambda _codec: REQUEST, events.append)
    until(lambda: bool(served.health()["sessions"]["writing"]))
    return events


def test_the_gateway_refuses_texts_while_nobody_could_write_them() -> None:
    fleet = MemoryFleet()
    fleet.broker.up = False
    served = Gateway(memory_service(fleet, drain_s=30.0))
    served.start()
    failures: list[object] = []
    outages = Outages(policy=OfflinePolicy.FAIL, after_s=0.0)
    served.submit(lambda _codec: replace(REQUEST, outages=outages), failures.append)
    until(lambda: bool(failures))
    assert isinstance(getattr(failures[0], "error", None), EdgeUnavailable)
    assert served.health()["status"] == "waiting"
    served.request_end(Asked.STOP)
    served.run()
    served.stop()


def test_a_gateway_that_goes_on_alone_says_so_while_nobody_answers() -> None:
    fleet = MemoryFleet()
    fleet.broker.up = False
    served = Gateway(memory_service(fleet, offline="local"))
    assert (served.health()["status"], bool(served.health()["reason"])) == ("local", True)
    served.stop()


def test_a_gateway_asked_to_drain_ends_its_text_first() -> None:
    fleet = MemoryFleet()
    with gateway(fleet) as served:
        assert served.health()["status"] == "ok"
        events = begin(served)
        served.request_end(Asked.DRAIN)
        left: list[int] = []
        running = threading.Thread(target=served.run, kwargs={"on_drain": left.append})
        running.start()
        until(lambda: served.health()["status"] == "draining")
        until(lambda: presence(fleet) is Presence.DRAINING)
        assert running.is_alive()
        with edge_at_work(fleet):
            running.join(PATIENCE_S)
        assert not running.is_alive()
    assert type(events[-1]).__name__ == "GeneratedText"
    assert left == [1]
    assert presence(fleet) is Presence.OFFLINE


@pytest.mark.parametrize("asked", [(Asked.DRAIN, Asked.DRAIN), (Asked.DRAIN, Asked.STOP), (Asked.STOP,)])
def test_a_gateway_asked_twice_ends_at_once_and_tells_of_its_end_once(asked: Sequence[Asked]) -> None:
    fleet, told = MemoryFleet(), list[str]()
    with gateway(fleet) as served:
        events = begin(served)
        running = threading.Thread(target=served.run, kwargs={"on_end": lambda: told.append("end")})
        running.start()
        for each in asked:
            assert running.is_alive()
            served.request_end(each)
            until(lambda: told == ["end"])
        running.join(PATIENCE_S)
        assert not running.is_alive()
    assert told == ["end"]
    assert isinstance(getattr(events[-1], "error", None), TextCancelled)
    fleet.settle()
    assert len(fleet.edge.sessions) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_gateway_that_is_stopped_answers_its_clients_before_it_goes(stream: bool) -> None:
    answers: list[httpx.Response] = []
    with gateway(MemoryFleet()) as served:
        url, body = f"{served.address}/v1/completions", {"prompt": "t1", "stream": stream}
        # No edge verifies it, so it never ends; the others wait in the queue.
        clients = [
            threading.Thread(target=lambda: answers.append(httpx.post(url, json=body, timeout=PATIENCE_S)))
            for _ in range(3)
        ]
        for client in clients:
            client.start()
        until(lambda: served.health()["sessions"] | {"ended": 0, "tokens": 0} == WAITING)
        served.stop()
        for client in clients:
            client.join()
    assert len(answers) == 3
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "cancelled")


WAITING = {"writing": 1, "at_once": 1, "waiting": 2, "ended": 0, "tokens": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_a_draft_model_that_dies_is_told_to_its_application(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, drafter = MemoryFleet(), TalkingDrafter()
    drawn = iter(range(3))

    def dies(policy: SamplingPolicy) -> object:
        if next(drawn, None) is None:
            raise DrafterError("The draft model has crashed.")
        return TalkingDrafter.next(drafter, policy)

    monkeypatch.setattr(drafter, "next", dies)
    with gateway(fleet, drafter) as served, edge_at_work(fleet):
        body = {"prompt": "t1", "max_tokens": 40, "stream": stream}
        answer = httpx.post(f"{served.address}/v1/completions", json=body, timeout=PATIENCE_S)
    told = answer.text.rstrip().rpartition("\n\n")[2].removeprefix("data: ")
    assert json.loads(told)["error"]["message"] == "The draft model has crashed."


def test_a_gateway_whose_port_is_taken_says_so_and_can_still_be_stopped() -> None:
    drafter = TalkingDrafter()
    with listen() as taken:
        served = Gateway(memory_service(MemoryFleet(), drafter, api_listen=f"127.0.0.1:{taken.getsockname()[1]}"))
        with pytest.raises(HttpServerError):
            served.start()
        served.stop()
    assert drafter.closed == 1


def test_free_memory_is_given_back_after_many_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    fleet, clock = MemoryFleet(), Clock()
    announce_edge(fleet)
    service = memory_service(fleet)
    service.clock = clock
    monkeypatch.setattr("fleet_device.service.give_back_free_memory", lambda: given.append(clock()))
    with at_work(fleet), service:
        for _ in range(4):
            service.generate(REQUEST)
            clock.seconds += 40.0
    assert given == [100.0, 180.0]


def test_two_devices_of_a_user_keep_their_reports_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    paths = {memory_service(MemoryFleet(), device=name).reports.folder for name in ("device-1", "device-2")}
    assert len(paths) == 2
    assert {path.parent for path in paths} == {tmp_path}
