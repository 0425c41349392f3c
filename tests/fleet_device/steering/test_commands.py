import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fleet_device.errors import SessionFailed, TextCancelled
from fleet_device.gateway import Asked, Gateway
from fleet_device.requests.generate import GenerateRequest
from fleet_device.service import DeviceService
from fleet_device.steering import commands
from fleet_device.steering.commands import MAX_LINES, Answer, Commands, LogTail
from fleet_device.steering.remote_settings import SteeredSettings
from fleet_device.updates.handoff import STATE, TESTED, TrialResult, UpdateFolder, UpdateState
from schemas.control import (
    MAX_RESULT,
    CommandOutcome,
    CommandRequest,
    CommandResponse,
    DesiredSettings,
    DeviceState,
    ReportedSettings,
    UpdateStage,
    decode_json,
    encode_json,
)
from schemas.policy import SamplingPolicy
from schemas.topics import Topic, build
from tests.support.memory_device import TalkingDrafter, announce_edge, at_work, settings
from tests.support.memory_fleet import FLEET, MemoryFleet
from tests.support.memory_link import MemoryLink
from tests.support.waiting import until

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, **known: Callable[..., Answer]) -> None:
        self.sent: list[CommandResponse] = []
        self.threads: list[Callable[[], None]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        monkeypatch.setattr("fleet_device.steering.commands.ACTIONS", known)
        device: Any = object()
        self.commands = Commands(
            device, self.sent.append, now=lambda: NOW, start=self.threads.append, after=self._after
        )

    def _after(self, seconds: float, work: Callable[[], None]) -> Callable[[], None]:
        timer = (seconds, work)
        self.timers.append(timer)
        return lambda: self.timers.remove(timer)

    def take(self, number: int = 1, command: str = "run", *, left_s: float = 10.0) -> None:
        deadline = NOW + timedelta(seconds=left_s)
        self.commands.accept(CommandRequest(id=f"{number:016x}", command=command, deadline=deadline, who="bob"))


def well(*_: Any) -> Answer:
    return Answer(CommandOutcome.OK, "Done.", "result")


def test_a_command_is_run_once_however_often_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    bench = Bench(monkeypatch, run=lambda *given: ran.append(given) or well())
    bench.take()
    bench.take()  # while it runs
    [thread] = bench.threads
    assert bench.sent == []
    thread()
    bench.take()  # when it has ended
    assert len(ran) == len(bench.threads) == 1
    assert [each.result for each in bench.sent] == ["result", "result"]
    assert bench.timers == []


def test_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, run=well)
    bench.take(1)
    bench.take(2)
    assert [(each.outcome.value, each.sentence) for each in bench.sent] == [
        ("refused", "The command run is still running; ask again later.")
    ]
    bench.threads.pop()()
    bench.take(3)
    bench.threads.pop()()
    assert bench.sent[-1].outcome is CommandOutcome.OK


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"left_s": -30.0}, "30 s too late by this device's clock, 2026-01-01 00:00:00 UTC"),
        ({"left_s": 0.0}, "too late"),
        ({"command": "format-disk"}, "knows no command 'format-disk'; it knows run."),
    ],
)
def test_a_refusal_has_its_reason(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], sentence: str) -> None:
    bench = Bench(monkeypatch, run=well)
    bench.take(**given)
    assert bench.threads == []
    assert bench.sent[0].outcome is CommandOutcome.REFUSED
    assert sentence in bench.sent[0].sentence


def test_a_slow_command_is_answered_and_blocks_others_until_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, run=well)
    bench.take(1, left_s=4.0)
    [(seconds, late)] = bench.timers
    assert seconds == 4.0
    late()
    assert [each.outcome.value for each in bench.sent] == ["failed"]
    bench.take(2)
    assert bench.sent[-1].outcome is CommandOutcome.REFUSED
    bench.threads.pop()()
    assert len(bench.sent) == 2, "its own answer comes too late"
    bench.take(3)
    assert len(bench.threads) == 1


def test_a_command_that_fails_unexpectedly_is_told_and_the_next_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Answer:
        raise KeyError("secret")

    bench = Bench(monkeypatch, run=fail)
    bench.take(1)
    bench.threads.pop()()
    assert (bench.sent[0].outcome, "secret" in bench.sent[0].sentence) == (CommandOutcome.FAILED, False)
    bench.take(2)
    assert len(bench.threads) == 1


def test_what_follows_an_answer_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    bench = Bench(monkeypatch, run=lambda *_: Answer(CommandOutcome.OK, "Well.", then=lambda: order.append("then")))
    monkeypatch.setattr(bench.commands, "_send", lambda _response: order.append("answer"))
    bench.take()
    bench.threads.pop()()
    assert order == ["answer", "then"]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, run=lambda *_: Answer(CommandOutcome.OK, "s" * 900, "x" * MAX_RESULT))
    for number in range(200):
        bench.take(number)
        bench.threads.pop()()
    assert len(bench.commands._answered) == 64
    bench.sent.clear()
    bench.take(150)
    [again] = bench.sent
    assert (len(again.sentence), len(again.result or "")) == (500, MAX_RESULT)


DEVICE = "device-1"
REQUEST = GenerateRequest((1, 2), SamplingPolicy(seed=3, temperature=1.0, top_k=0, top_p=1.0), 12)


def topic(which: Topic, device: str = DEVICE) -> str:
    return build(which, fleet=FLEET, device=device)


class Monitor:
    def __init__(self, fleet: MemoryFleet) -> None:
        self.answers: list[CommandResponse] = []
        self.fleet = fleet
        self.link = MemoryLink(fleet.broker, "monitor")
        self.link.subscribe(
            topic(Topic.COMMAND_RESPONSE),
            lambda message: self.answers.append(decode_json(CommandResponse, message.payload)),
        )
        self.link.start(timeout_s=1.0)
        self._number = 0

    def want(self, number: int, **values: Any) -> None:
        self.say(encode_json(DesiredSettings(id=f"{number:08x}", values=values, who="alice")))

    def say(self, payload: bytes) -> None:
        self.link.publish(topic(Topic.CONFIG_DESIRED), payload, retain=True)

    def reported(self) -> ReportedSettings | None:
        kept = self.fleet.broker.retained(topic(Topic.CONFIG_REPORTED))
        return None if kept is None else decode_json(ReportedSettings, kept)

    def command(self, name: str) -> CommandResponse:
        self._number += 1
        request = CommandRequest(
            id=f"{self._number:016x}",
            command=name,
            deadline=datetime.now(UTC) + timedelta(seconds=30),
        )
        before = len(self.answers)
        self.link.publish(topic(Topic.COMMAND_REQUEST), encode_json(request))
        until(lambda: len(self.answers) > before)
        return self.answers[-1]


class Steered:
    def __init__(self, fleet: MemoryFleet, tmp_path: Path, **given: Any) -> None:
        own = settings(state_dir=tmp_path, seed=None, **given)
        self.remote = SteeredSettings.of(own)
        self.tail = LogTail()
        service = DeviceService(
            self.remote.settings,
            TalkingDrafter(),
            make_link=lambda link: MemoryLink(fleet.broker, link.client_id, will=link.will),
        )
        self.gateway = Gateway(service, remote=self.remote, log_tail=self.tail)
        self.service = service
        self.monitor = Monitor(fleet)

    def presence(self) -> str | None:
        kept = self.monitor.fleet.broker.retained(topic(Topic.STATE))
        return None if kept is None else decode_json(DeviceState, kept).presence.value

    def applied(self, number: int) -> ReportedSettings:
        until(lambda: (said := self.monitor.reported()) is not None and said.id == f"{number:08x}")
        said = self.monitor.reported()
        assert said is not None
        return said


@contextmanager
def steered(tmp_path: Path, **given: Any) -> Iterator[Steered]:
    fleet = MemoryFleet()
    it = Steered(fleet, tmp_path, **given)
    with at_work(fleet):
        announce_edge(fleet)
        it.gateway.start()
        try:
            until(lambda: it.service.link.connected and bool(it.service.edges.online()))
            yield it
        finally:
            it.gateway.stop()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Steered]:
    with steered(tmp_path) as it:
        yield it


def test_settings_are_used_by_the_next_text_without_a_restart(device: Steered) -> None:
    before = device.service.agent._lanes._all[0].pacing
    device.monitor.want(1, draft_length=2, padding=16, answer_s=7.5)
    device.applied(1)
    agent = device.service.agent
    pacing = agent._lanes._all[0].pacing
    assert pacing is not before
    assert pacing.plan(longest=8, window=8).tokens == 2
    assert (agent.padding, agent.retry_policy.open_s) == (16, 7.5)
    text = device.service.generate(REQUEST)
    assert text.generation.choice.reason == "The settings say so."


def test_a_device_that_was_away_takes_what_the_broker_has_kept(tmp_path: Path) -> None:
    fleet = MemoryFleet()
    early = Monitor(fleet)
    early.want(3, top_k=9)
    fleet.broker.pump()
    it = Steered(fleet, tmp_path)
    with at_work(fleet):
        it.gateway.start()
        assert it.applied(3).values["top_k"] == 9
        it.gateway.stop()


def test_a_report_is_said_again_after_a_reconnect(device: Steered) -> None:
    device.monitor.want(1, top_k=9)
    device.applied(1)
    broker = device.monitor.fleet.broker
    device.monitor.link.publish(topic(Topic.CONFIG_REPORTED), b"", retain=True)
    until(lambda: device.monitor.reported() is None)
    broker.kill(f"{FLEET}:{DEVICE}")
    broker.revive(f"{FLEET}:{DEVICE}")
    assert device.applied(1).values["top_k"] == 9


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff",
        b"{",
        b"[]",
        b"{}",
        b'{"id":"00000002"}',
        b'{"id":2,"values":{}}',
        b'{"id":"00000002","values":{"top_k":[1]}}',
        json.dumps({"id": "00000002", "values": {f"k{number}": 1 for number in range(65)}}).encode(),
        b'{"id":"00000002","values":{},"x":"' + b"a" * (64 << 10) + b'"}',
        b"[" * 20_000,
    ],
)
def test_what_is_no_message_changes_nothing(device: Steered, payload: bytes, caplog: pytest.LogCaptureFixture) -> None:
    device.monitor.say(payload)
    until(lambda: "is ignored" in caplog.text)
    device.monitor.want(1, top_k=9)
    assert device.applied(1).values["top_k"] == 9


def test_of_a_flood_of_wanted_settings_the_latest_hold(device: Steered) -> None:
    with device.remote._changing:  # the thread that looks at them waits
        for number in range(1, 200):
            device.monitor.want(number, top_k=number)
        device.monitor.want(200, top_k=7)
    assert device.applied(200).values["top_k"] == 7


def test_a_flood_of_commands_is_dropped_and_reported_once(device: Steered, caplog: pytest.LogCaptureFixture) -> None:
    with device.remote._changing:
        device.monitor.want(1, top_k=7)
        until(lambda: device.gateway._steering._wanted is None)  # type: ignore[union-attr]
        for number in range(100):
            deadline = datetime.now(UTC) + timedelta(seconds=30)
            request = CommandRequest(id=f"{number:016x}", command="resume", deadline=deadline)
            device.monitor.link.publish(topic(Topic.COMMAND_REQUEST), encode_json(request))
        until(lambda: "are dropped" in caplog.text)
    assert device.applied(1).values["top_k"] == 7
    assert device.monitor.command("resume").outcome.value in {"ok", "refused"}
    assert caplog.text.count("are dropped") == 1


def test_a_drained_device_takes_nothing_until_it_is_resumed(device: Steered) -> None:
    assert device.monitor.command("drain").outcome.value == "ok"
    until(lambda: device.presence() == "draining")
    assert device.gateway.health()["status"] == "draining"
    with pytest.raises(TextCancelled):
        device.gateway.submit(lambda _codec: REQUEST, lambda _event: None)
    assert device.monitor.command("resume").sentence == "The device accepts requests again."
    until(lambda: device.presence() == "online")
    ended: list[Any] = []
    device.gateway.submit(lambda _codec: REQUEST, ended.append)
    until(lambda: bool(ended) and hasattr(ended[-1], "tokens") and hasattr(ended[-1], "reason"))
    assert device.monitor.command("resume").sentence == "The device was accepting requests."


def test_a_reload_ends_the_device_to_begin_anew_unless_it_is_told_to_end(device: Steered) -> None:
    assert device.monitor.command("reload").outcome.value == "ok"
    device.gateway.run()
    assert device.gateway.reloads
    device.gateway.request_end(Asked.DRAIN)  # a signal that comes while it ends
    assert not device.gateway.reloads


def test_a_self_test_writes_a_text_through_the_edge(device: Steered) -> None:
    answer = device.monitor.command("self-test")
    assert answer.outcome.value == "ok", answer.sentence
    assert json.loads(answer.result or "")["tokens"] > 0


def test_a_self_test_without_an_edge_says_what_is_missing(tmp_path: Path) -> None:
    fleet = MemoryFleet()
    it = Steered(fleet, tmp_path)
    with at_work(fleet):
        it.gateway.start()
        until(lambda: it.service.link.connected)
        answer = it.monitor.command("self-test")
        it.gateway.stop()
    assert answer.outcome.value == "failed"
    assert "No edge" in answer.sentence


def test_the_log_tail_has_the_last_lines(device: Steered) -> None:
    for number in range(MAX_LINES + 20):
        record = logging.LogRecord("a.module.of.the.device", logging.WARNING, "", 0, "line %d\x1b[2J", (number,), None)
        device.tail.handle(record)
    found = device.monitor.command("log-tail").result or ""
    assert [line.rpartition("line ")[2][:3] for line in found.splitlines()[-2:]] == ["218", "219"]
    assert "\x1b" not in found
    assert len(found) == MAX_RESULT


@pytest.mark.parametrize("fails", [False, True])
def test_a_release_that_was_just_installed_tests_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(commands, "_UPDATE_POLL_S", 0.01)
    if fails:
        monkeypatch.setattr(commands, "probe_request", _refuse)
    (tmp_path / "updates" / "inbox").mkdir(parents=True)
    shared, trial = UpdateFolder(tmp_path / "updates"), "0123456789abcdef"
    state = UpdateState(release=3, stage=UpdateStage.TESTING, trial=trial, at=NOW)
    shared.write(STATE, state)
    with steered(tmp_path, update_dir=shared.path) as it:
        until(lambda: shared.trial() is None)
        result = shared.read(TrialResult, TESTED)
        assert result is not None
        assert (result.trial, result.ok) == (trial, not fails)
        assert ("vocabulary" in result.sentence) == fails
        shared.write(STATE, UpdateState(release=3, stage=UpdateStage.DONE, running="update-3", at=NOW))
        until(lambda: (said := it.monitor.reported()) is not None and said.update is not None)
        until(lambda: (said := it.monitor.reported()) is not None and said.update.stage is UpdateStage.DONE)


def _refuse(*_: Any) -> None:
    raise SessionFailed("The edge does not know this vocabulary.")
