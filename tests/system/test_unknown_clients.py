import subprocess
from pathlib import Path

import pytest

from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess, hand_over, unprivileged_user
from fleet_common.mqtt.errors import ConnectFailed, LinkFault, PublishRejected
from fleet_common.mqtt.link import PublishOutcome
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings
from fleet_edge.service import EdgeService
from fleet_edge.settings import EdgeSettings
from schemas.topics import Topic, build
from tests.support.brokers import require_mosquitto
from tests.support.scripted_language import CONTEXT, LANGUAGE, draft_language
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.waiting import PATIENCE_S, until
from tests.support.whole import FLEET

pytestmark = pytest.mark.broker

OTHER = "elsewhere"


@pytest.mark.parametrize(("fleet", "name"), [(OTHER, "edge-1"), (FLEET, "edge-9")])
def test_an_edge_that_the_broker_does_not_let_speak_does_not_start(
    mosquitto: MosquittoProcess, tmp_path: Path, fleet: str, name: str
) -> None:
    settings = EdgeSettings(
        fleet=fleet,
        edge=name,
        broker=BrokerSettings(port=mosquitto.port),
        db=f"sqlite:///{tmp_path / 'fleet.sqlite3'}",
        spool=tmp_path / "spool",
    )
    verifier = ScriptedVerifier(LANGUAGE, LANGUAGE.words, context=CONTEXT)
    service = EdgeService(settings, verifier)
    with pytest.raises(PublishRejected, match=f"{fleet}"):
        service.start()


def test_a_device_of_another_fleet_says_that_it_may_not_speak(mosquitto: MosquittoProcess) -> None:
    settings = DeviceSettings(fleet=OTHER, device="device-1", broker=BrokerSettings(port=mosquitto.port))
    script = draft_language()
    with DeviceService(settings, ScriptedDrafter(script, script.words)) as service:
        until(lambda: (missing := service.absence()) is not None and missing.code == LinkFault.NOT_AUTHORIZED)


def test_equal_names_in_two_fleets_at_one_broker_do_not_meet(mosquitto: MosquittoProcess) -> None:
    place = BrokerSettings(port=mosquitto.port)
    links = [PahoLink(place.link(fleet, "gateway", will=None)) for fleet in (FLEET, OTHER)]
    for link in links:
        link.start(timeout_s=PATIENCE_S)
    answered: list[PublishOutcome] = []
    for link in links:
        link.publish(build(Topic.TELEMETRY, fleet=FLEET, device="gateway"), b"{}", on_outcome=answered.append)
    until(lambda: len(answered) == len(links))
    assert [link.counters.losses for link in links] == [0, 0]
    for link in links:
        link.stop()


class GuardedMosquitto(MosquittoProcess):
    def _prepare(self, directory: Path) -> list[str]:
        command = super()._prepare(directory)
        passwords = directory / "passwords"
        subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, "known", "right"], check=True)
        hand_over(directory, unprivileged_user())
        conf = Path(command[-1])
        conf.write_text(conf.read_text().replace("acl_file", f"password_file {passwords}\n# acl_file"))
        return command


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({}, None),  # as nobody, since the broker does not know the client's name
        ({"username": "known", "password": "right"}, None),
        ({"username": "known", "password": "wrong"}, LinkFault.NOT_AUTHORIZED),
        ({"username": "unknown"}, LinkFault.NOT_AUTHORIZED),
    ],
)
def test_a_broker_with_passwords_and_without_names(given: dict[str, str], fault: LinkFault | None) -> None:
    require_mosquitto()
    with GuardedMosquitto(Broker()) as broker:
        link = PahoLink(BrokerSettings.model_validate({"port": broker.port, **given}).link(FLEET, "a", will=None))
        if fault is None:
            link.start(timeout_s=PATIENCE_S)
            assert link.connected
        else:
            with pytest.raises(ConnectFailed) as caught:
                link.start(timeout_s=PATIENCE_S)
            assert caught.value.fault is fault
        link.stop()
