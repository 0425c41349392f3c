import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fleet_device import (
    ChatMessage,
    ConnectFailed,
    Device,
    DeviceClosed,
    EdgeUnavailable,
    GeneratedText,
    Grammar,
    InvalidRequest,
    TextCancelled,
)
from schemas.control import DeviceState, Presence, decode_json
from schemas.reasons import EndReason
from schemas.topics import Topic, build
from tests.support.memory_device import TalkingDrafter, announce_edge, at_work, settings
from tests.support.memory_fleet import FLEET, MemoryFleet
from tests.support.memory_link import MemoryLink
from tests.support.waiting import PATIENCE_S, until

COUPLED: Any = {"mode": "coupled", "temperature": 0.8, "top_k": 5, "top_p": 0.93}
LONG = 40  # tokens; the output of seed 6 has no end token


def made(fleet: MemoryFleet, drafter: TalkingDrafter | None = None, **given: Any) -> Device:
    return Device(
        settings(**given),
        load=lambda _settings: drafter or TalkingDrafter(),
        make_link=lambda link: MemoryLink(fleet.broker, link.client_id, will=link.will),
    )


@contextmanager
def at_home(**given: Any) -> Iterator[tuple[Device, MemoryFleet]]:
    fleet = MemoryFleet()
    announce_edge(fleet)
    with at_work(fleet), made(fleet, **given) as device:
        yield device, fleet


def test_a_text_is_written_and_tells_of_itself() -> None:
    with at_home() as (device, _):
        text = device.generate("t1 t2", raw=True, max_new_tokens=LONG, seed=6, **COUPLED)
    assert isinstance(text, GeneratedText)
    assert text.text.split() == [f"t{token}" for token in text.tokens]
    assert (len(text.tokens), text.reason, text.seed) == (LONG, EndReason.LENGTH, 6)
    assert len(text.session) == 16
    assert text.acceptance is not None
    assert text.tokens_per_s > 0
    assert len(repr(text)) < 250
    assert "\n" not in repr(text)
    assert text.session in repr(text)


def test_text_chat_and_tokens_are_the_same_prompt() -> None:
    with at_home() as (device, _):
        prompts: list[Any] = [
            "t1",
            [{"role": "user", "content": "t1"}],
            [ChatMessage("user", "t1")],
            device.drafter.codec.encode("user: t1 "),
        ]
        texts = [device.generate(prompt, seed=6, max_new_tokens=8, **COUPLED) for prompt in prompts]
    assert len({text.tokens for text in texts}) == 1


def test_leaving_a_stream_closes_its_session_and_the_next_text_is_written() -> None:
    with at_home() as (device, fleet):
        for _ in device.stream("t1 t2", raw=True, max_new_tokens=4000, seed=6, **COUPLED):
            break
        until(lambda: len(fleet.edge.sessions) == 0)
        assert device.generate("t1", max_new_tokens=4).tokens
        until(lambda: len(fleet.edge.sessions) == 0)


def test_a_device_that_is_not_open_says_so_and_can_be_opened_again() -> None:
    with at_home() as (device, _):
        device.open()  # it is open already
        device.close()
        device.close()
        for use in (
            lambda: device.generate("t1"),
            lambda: device.stream("t1"),
            lambda: device.wait_for_edge(0.0),
            lambda: device.drafter,
        ):
            with pytest.raises(DeviceClosed):
                use()
        device.open()
        assert device.generate("t1", max_new_tokens=2).tokens


def test_a_program_that_closes_its_device_is_not_missed() -> None:
    with at_home() as (device, fleet):
        device.generate("t1", max_new_tokens=2)
        device.close()
        payload = fleet.broker.retained(build(Topic.STATE, fleet=FLEET, device=device.settings.device))
        assert payload is not None
        assert decode_json(DeviceState, payload).presence is Presence.CLOSED


def test_closing_a_device_gives_up_what_is_being_written_and_what_waits() -> None:
    fleet, failures = MemoryFleet(), list[BaseException]()
    announce_edge(fleet)

    def write(device: Device) -> None:
        try:
            device.generate("t1", max_new_tokens=4)
        except TextCancelled as error:
            failures.append(error)

    with fleet.broker.running():  # nobody verifies: it would take for ever
        with made(fleet, answer_s=600.0) as device:
            threads = [threading.Thread(target=write, args=(device,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            texts = device._open.queue
            until(lambda: (texts.running, texts.waiting) == (True, 2))
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
    assert len(failures) == 3


def test_without_an_edge_a_text_fails_after_a_while() -> None:
    fleet = MemoryFleet()
    with fleet.broker.running(), made(fleet, answer_s=0.05, offline_s=0.05) as device:
        assert not device.wait_for_edge(0.01)
        with pytest.raises(EdgeUnavailable, match="fleet edge run"):
            device.generate("t1")
        announce_edge(fleet)
        assert device.wait_for_edge(PATIENCE_S)


def test_without_a_broker_it_does_not_open_and_frees_the_model() -> None:
    drafter, fleet = TalkingDrafter(), MemoryFleet()
    fleet.broker.up = False
    with pytest.raises(ConnectFailed), made(fleet, drafter):
        pass
    assert drafter.closed == 1


def test_settings_come_from_file_environment_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "device.toml"
    config.write_text('fleet = "home"\ndevice = "hall"\ntop_k = 3\n[broker]\nport = 2000\n')
    monkeypatch.setenv("FLEET_DEVICE_TOP_K", "5")
    chosen = Device.from_config(config, device="attic", broker={"host": "10.0.0.1"}).settings
    assert (chosen.fleet, chosen.device, chosen.top_k) == ("home", "attic", 5)
    assert (chosen.broker.host, chosen.broker.port) == ("10.0.0.1", 2000)
    monkeypatch.setenv("FLEET_DEVICE_CONFIG", str(config))
    assert Device.from_config().settings.device == "hall"


def test_importing_the_device_loads_neither_llama_cpp_nor_a_web_server() -> None:
    code = (
        "import sys, fleet_device; before = set(sys.modules); from fleet_device import Device\n"
        "heavy = {'llama_cpp', 'uvicorn', 'torch'}; print(heavy & set(sys.modules), {'paho', 'jinja2'} & before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set() set()"


@pytest.mark.parametrize("grammar", [Grammar.regex("("), Grammar.json_schema({"not": {}}), Grammar.lark("start: x")])
def test_a_grammar_that_cannot_be_used_is_refused_whether_an_edge_is_there_or_not(grammar: Grammar) -> None:
    with made(MemoryFleet(), offline="wait") as device:
        with pytest.raises(InvalidRequest):
            device.generate("t1 t2", grammar=grammar)
        with pytest.raises(InvalidRequest):
            device.stream("t1 t2", grammar=grammar)
