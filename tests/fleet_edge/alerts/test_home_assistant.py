import json
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fleet_common.mqtt.errors import NotConnected
from fleet_common.mqtt.link import Message
from fleet_edge.session_log.alerts.delivery import BrokerChannel, HomeAssistant
from fleet_edge.session_log.alerts.evaluator import RunningAlerts
from fleet_edge.session_log.alerts.settings import AlertSettings
from fleet_edge.session_log.database import open_store, transaction
from schemas.control import Presence
from tests.fleet_edge.store import samples
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink
from tests.support.waiting import until

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
SETTINGS = AlertSettings(fleet="north", home_assistant=True)
DEVICE = "homeassistant/device/north_-pump_d1"


class Home:
    """What a Home Assistant has retained, by topic; each `look` evaluates the rules once."""

    def __init__(self, folder: Path, publish: Any = None, *, fleet: str = "north") -> None:
        url = f"sqlite:///{folder / 'fleet.sqlite3'}"
        self.store = open_store(url)
        self.seen: dict[str, bytes] = {}
        self.messages = 0
        self.home = HomeAssistant(fleet, publish or self.publish)
        connect = partial(transaction, self.store.engine)
        self.evaluator = RunningAlerts(connect, AlertSettings(), home=self.home, now=lambda: NOW)

    def publish(self, topic: str, payload: bytes) -> None:
        self.seen[topic] = payload
        self.messages += 1

    def look(self, *records: Any) -> None:
        self.store.apply(records)
        self.evaluator.step()

    @property
    def state(self) -> Any:
        return json.loads(self.seen[f"{DEVICE}/state"])


def test_a_device_appears_with_its_state_acceptance_and_tokens_of_today(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.look(samples.device_seen(device="pump.1", at=NOW))
    config = json.loads(home.seen[f"{DEVICE}/config"])
    assert config["state_topic"] == f"{DEVICE}/state"
    assert config["device"]["name"] == "pump.1"
    assert home.state == {"state": "online", "acceptance": None, "tokens_today": 0}
    for name, sensor in config["components"].items():
        assert sensor["value_template"] == f"{{{{ value_json.{name} }}}}"
        assert name in home.state
    assert home.state["state"] in config["components"]["state"]["options"]


def test_devices_of_two_fleets_never_have_the_same_name(tmp_path: Path) -> None:
    seen: set[str] = set()
    for fleet, device in (("a-b", "c"), ("a", "b-c"), ("a_b", "c"), ("a", "b_c"), ("a.b", "c"), ("a", "b.c")):
        folder = tmp_path / f"{fleet} {device}"
        folder.mkdir()
        home = Home(folder, fleet=fleet)
        home.look(samples.device_seen(device=device, at=NOW))
        assert not seen & home.seen.keys()
        seen |= home.seen.keys()


def test_only_what_has_changed_is_published_and_all_of_it_to_a_broker_that_may_have_lost_it(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.look(samples.device_seen(device="pump.1", at=NOW))
    home.look()
    assert home.messages == 2
    home.look(samples.device_seen(device="pump.1", presence=Presence.OFFLINE, at=NOW + timedelta(seconds=1)))
    assert home.messages == 3
    assert home.state["state"] == "offline"
    home.home.forget()
    home.look()
    assert home.messages == 5


def test_what_could_not_be_published_is_published_later(tmp_path: Path) -> None:
    away = True

    def publish(topic: str, payload: bytes) -> None:
        if away:
            raise NotConnected("The queue is full.")
        home.publish(topic, payload)

    home = Home(tmp_path, publish)
    home.look(samples.device_seen(device="pump.1", at=NOW))
    assert not home.seen
    away = False
    home.look()
    assert len(home.seen) == 2


def test_a_message_is_retained_by_the_broker() -> None:
    broker = MemoryBroker()
    channel = BrokerChannel(SETTINGS, make_link=lambda link: MemoryLink(broker, link.client_id, will=link.will))
    with broker.running():
        channel.retain(f"{DEVICE}/state", b"{}")
        heard: list[Message] = []
        late = MemoryLink(broker, "home")
        late.subscribe("homeassistant/#", heard.append)
        late.start(timeout_s=1.0)
        until(lambda: [message.payload for message in heard] == [b"{}"])
        late.stop()
        channel.close()


def test_without_a_fleet_there_are_no_devices_to_show() -> None:
    with pytest.raises(ValidationError, match="fleet"):
        AlertSettings(home_assistant=True)
