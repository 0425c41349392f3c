import stat
from pathlib import Path

import pytest

from broker_config.broker import BrokerError, BrokerFilesError
from broker_config.site import make_local_broker
from fleet_common.identity.files import IdentityError
from fleet_common.mqtt.link import publish_confirmed
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings, TlsSettings
from fleet_common.settings import load_settings
from fleet_device.settings import DeviceSettings
from fleet_edge.settings import EdgeSettings
from schemas.topics import Topic, build
from tests.support.brokers import require_mosquitto
from tests.support.links import START_S, Inbox
from tests.support.local_broker import LocalBroker
from tests.support.waiting import until

pytestmark = [pytest.mark.broker, pytest.mark.xdist_group("demo")]  # both have the API at its usual port


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_mosquitto()
    folder = tmp_path_factory.mktemp("made") / "broker"
    make_local_broker(folder, fleet="home", edges=["edge-1"], devices=["device-1", "device-2"], port=18_883)
    return folder


def link_to(broker: LocalBroker, name: str) -> PahoLink:
    files = broker.identity(name)
    tls = TlsSettings(files.ca, files.certificate, files.key)
    return PahoLink(LinkSettings(client_id=name, host="localhost", port=broker.broker.port_of(name), tls=tls))


def test_what_is_retained_outlives_a_restart(made: Path) -> None:
    topic = build(Topic.STATE, fleet="home", device="device-1")
    with LocalBroker(made, port=0) as broker:
        device = link_to(broker, "device-1")
        device.start(timeout_s=START_S)
        publish_confirmed(device, topic, b"here", timeout_s=START_S, retain=True)
        device.stop()
        broker.restart()
        for name in ("monitor", "dashboard"):
            monitor, inbox = link_to(broker, name), Inbox()
            monitor.subscribe(topic, inbox)
            monitor.start(timeout_s=START_S)
            until(lambda inbox=inbox: inbox.payloads == [b"here"])  # type: ignore[misc]
            monitor.stop()


def test_no_secret_is_open_to_others(made: Path) -> None:
    keys = [*made.rglob("*.key")]
    assert len(keys) == 8  # authority, broker, edge, its probe, two monitors and two devices
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_every_edge_and_device_has_settings_that_can_be_read(made: Path, tmp_path: Path) -> None:
    odd = tmp_path / 'a "folder" of ours'
    make_local_broker(odd, fleet="home", edges=["edge-1", "north"], devices=["device-1"], port=18_886)
    for folder, edges, devices in (
        (made, ["edge-1"], ["device-1", "device-2"]),
        (odd, ["edge-1", "north"], ["device-1"]),
    ):
        assert sorted(path.stem for path in (folder / "settings").glob("*.toml")) == sorted([*edges, *devices])
        for name in (*edges, *devices):
            model: type[EdgeSettings | DeviceSettings] = EdgeSettings if name in edges else DeviceSettings
            settings = load_settings(model, config=folder / "settings" / f"{name}.toml", flags={})
            assert name == (settings.edge if isinstance(settings, EdgeSettings) else settings.device)
            assert settings.broker.key == folder.resolve() / "identities" / f"{name}.key"
            assert settings.broker.key.is_file()
            port = 18_883 if folder is made else 18_886
            assert settings.broker.port == (port + 1 if name in edges else port)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    require_mosquitto()
    (tmp_path / "mine").write_text("")
    with pytest.raises(BrokerError):
        make_local_broker(tmp_path, fleet="home", edges=["edge-1"], devices=[], port=18_885)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_name_of_another_role_is_one_sentence_and_makes_nothing(tmp_path: Path) -> None:
    require_mosquitto()
    folder = tmp_path / "broker"
    with pytest.raises(IdentityError):
        make_local_broker(folder, fleet="home", edges=["edge-1"], devices=["edge-7"], port=18_885)
    with pytest.raises(BrokerFilesError):
        make_local_broker(folder, fleet="home", edges=["_edge"], devices=[], port=18_885)
    assert not folder.exists()
