from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_config.broker import Broker
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.gateway import Gateway
from fleet_edge.session_log.database import open_store
from tests.fleet_edge.store import samples
from tests.support.brokers import StartBroker
from tests.support.command import Run, as_json, refused
from tests.support.steered_devices import steered_devices
from tests.support.waiting import until

FLEET = "afar"


@pytest.fixture(autouse=True)
def _as_ada(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_ADMIN_FLEET", FLEET)
    monkeypatch.setattr("fleet_cli.options.operator", lambda: "ada")


@pytest.fixture
def devices(start_mosquitto: StartBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Gateway]]:
    mosquitto = start_mosquitto(Broker(fleet=FLEET))
    monkeypatch.setenv("FLEET_ADMIN_BROKER__PORT", str(mosquitto.port))
    place = BrokerSettings(port=mosquitto.port)
    names = ("afar-1", "afar-2")
    with steered_devices(names, fleet=FLEET, brokers=dict.fromkeys(names, place), folder=tmp_path) as running:
        until(lambda: all(each.service.link.connected for each in running))
        yield running


def test_labels_are_given_listed_and_taken_off(admin: Run) -> None:
    code, output, complaint = admin("label", "gw-1", "gw-2", "--add", "hall_a")
    assert (code, output) == (0, "gw-1: hall_a\ngw-2: hall_a\n")
    assert "gw-1" in complaint
    admin("label", "gw-2", "--remove", "hall_a", "--add", "roof")
    assert as_json(admin("labels", "--json")) == [
        {"label": "hall_a", "devices": ["gw-1"]},
        {"label": "roof", "devices": ["gw-2"]},
    ]
    assert as_json(admin("labels", "label=roof", "--json")) == [{"label": "roof", "devices": ["gw-2"]}]
    assert "gw-1" in admin("labels")[1]


def test_who_has_done_it_is_the_user_or_who_the_user_says_to_be(admin: Run) -> None:
    admin("label", "gw-1", "--add", "hall_a")
    admin("label", "gw-1", "--add", "roof", "--as", "grace")
    admin("quarantine", "gw-1", "--as", "grace")
    found = as_json(admin("audit", "--json"))
    assert sorted((each["who"], each["action"]) for each in found) == [
        ("ada", "label"),
        ("grace (ada)", "label"),
        ("grace (ada)", "quarantine"),
    ]
    assert [each["after"] for each in as_json(admin("audit", "who=ada", "--json"))] == ["hall_a"]
    assert "grace (ada)" in admin("audit", "subject=gw-1", "--since", "1h")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("label", "gw-1"), "Nothing is to be labelled: name a device, and a label to add or to remove."),
        (("label", "gw-1", "--add", "a b"), "'a b' is not a valid name"),
        (("retire", "gw-9", "--log-only"), "No device gw-9 has been seen"),
        (("retire", "gw-9", "--port", "1"), "No broker listens at 127.0.0.1:1"),
        (("set", "top_k", "--all"), "'top_k' is no setting; write it as KEY=VALUE."),
        (("set", "top_k=5"), "Nobody is chosen: give --device, --label, --all"),
        (("set", "top_k=5", "--all", "--port", "1"), "No broker listens at 127.0.0.1:1"),
        (("settings", "--port", "1"), "No broker listens at 127.0.0.1:1"),
        (("audit", "--since", "soon"), "'soon' is neither an age such as 2h"),
        (("commands", "--since", "soon"), "'soon' is neither an age such as 2h"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    admin: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], sentence: str
) -> None:
    monkeypatch.setattr("fleet_admin.steering.wire._CONNECT_S", 0.5)
    assert sentence in refused(admin(*arguments))


@pytest.mark.broker
def test_a_fleet_is_previewed_set_and_asked(admin: Run, devices: list[Gateway]) -> None:
    planned = as_json(admin("set", "top_k=7", "--all", "--dry-run", "--json"))
    assert [(each["device"], each["after"]) for each in planned] == [("afar-1", {"top_k": 7}), ("afar-2", {"top_k": 7})]
    assert "Nothing was changed" in admin("set", "top_k=7", "--all", "--dry-run")[1]
    assert as_json(admin("audit", "--json")) == []
    assert [each.service.settings.top_k for each in devices] == [50, 50]
    found = as_json(admin("set", "top_k=7", "draft_length=3", "--all", "--json"))
    assert {each["state"] for each in found} == {"in force"}
    assert [each.service.settings.top_k for each in devices] == [7, 7]
    [found] = as_json(admin("set", "model=never:Q4_0", "--device", "afar-1", "--json"), code=1)
    assert found["state"] == "refused"
    views = {each["device"]: each for each in as_json(admin("settings", "--json"))}
    assert (views["afar-2"]["state"], views["afar-2"]["wanted"]) == ("in force", {"top_k": 7, "draft_length": 3})
    assert "--limit 2" in admin("settings", "--limit", "1")[1]
    table = admin("settings", "--device", "afar-1")[1]
    assert "refused: There is no model never" in table
    assert views["afar-2"]["values"]["top_k"] == 7
    assert "There is no device 'afar-3'" in refused(admin("settings", "--device", "afar-3"))
    found = as_json(admin("unset", "top_k", "--all", "--json"))
    assert {each["state"] for each in found} == {"in force"}
    assert [each.service.settings.top_k for each in devices] == [50, 50]
    assert "it must be a whole number from 0 to 1000000." in refused(admin("set", "top_k=-1", "--all"))
    assert "afar-3" in refused(admin("set", "top_k=1", "--device", "afar-3"))


@pytest.mark.broker
def test_a_fleet_is_commanded(admin: Run, devices: list[Gateway], tmp_path: Path) -> None:
    found = as_json(admin("command", "drain", "--all", "--json"))
    assert [each["outcome"] for each in found] == ["ok", "ok"]
    assert {each.health()["status"] for each in devices} == {"draining"}
    assert admin("command", "resume", "--all")[0] == 0
    assert as_json(admin("command", "self-test", "--device", "afar-1", "--json"), code=1)[0]["outcome"] == "failed"
    assert "format" in refused(admin("command", "format", "--all"))
    assert admin("command", "log-tail", "--device", "afar-1", "--out", str(tmp_path / "tails"))[0] == 0
    assert (tmp_path / "tails" / "afar-1.log-tail.txt").exists()
    given = as_json(admin("commands", "device=afar-1", "--json"))
    assert [each["command"] for each in given][-2:] == ["resume", "drain"]
    assert {each["outcome"] for each in given} == {"ok", "failed"}
    assert "log-tail" in admin("commands")[1]


@pytest.mark.broker
def test_a_retired_device_has_no_wanted_settings(admin: Run, devices: list[Gateway], tmp_path: Path) -> None:
    del devices
    with open_store(f"sqlite:///{tmp_path / 'fleet.sqlite3'}") as store:
        store.apply([samples.device_seen(device="afar-1")])
    assert admin("set", "top_k=7", "--all")[0] == 0
    assert admin("retire", "afar-1")[0] == 0
    views = {each["device"]: each for each in as_json(admin("settings", "--json"))}
    assert (views["afar-1"]["state"], views["afar-1"]["wanted"]) == ("none wanted", {})
    [planned] = as_json(admin("set", "top_p=0.5", "--all", "--dry-run", "--json"))
    assert planned["device"] == "afar-2"
    [planned] = as_json(admin("set", "top_p=0.5", "--device", "afar-1", "--dry-run", "--json"))
    assert planned["wanted"] == {"top_p": 0.5}
    assert admin("retire", "afar-1", "--undo")[0] == 0
    assert len(as_json(admin("set", "top_p=0.5", "--all", "--dry-run", "--json"))) == 2
