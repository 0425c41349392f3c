"""Who has a name that the broker does not know, or is in another fleet, is told so: it would be online for nobody."""

from pathlib import Path

import pytest

from broker_config.processes.runner import MosquittoProcess
from fleet_device.drafters.scripted import ScriptedDrafter
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings
from fleet_edge.service import EdgeService
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.scripted import ScriptedVerifier
from fleet_link.errors import PublishRejected
from fleet_link.paho_link import PahoLink
from fleet_link.settings import BrokerSettings, LinkSettings
from tests.support.scripted_language import CONTEXT, LANGUAGE, draft_language
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
    with pytest.raises(PublishRejected, match=f"does not let this client publish to dssd/v1/{fleet}/_edge/{name}/"):
        service.start()


def test_a_device_of_another_fleet_says_that_it_may_not_speak(mosquitto: MosquittoProcess) -> None:
    settings = DeviceSettings(fleet=OTHER, device="device-1", broker=BrokerSettings(port=mosquitto.port))
    script = draft_language()
    with DeviceService(settings, ScriptedDrafter(script, script.words)) as service:
        until(lambda: "does not let this client publish" in (service.absence() or ""))


def test_two_clients_of_one_name_are_told(mosquitto: MosquittoProcess, caplog: pytest.LogCaptureFixture) -> None:
    settings = LinkSettings(client_id="twice", port=mosquitto.port)
    first, second = PahoLink(settings), PahoLink(settings)
    first.start(timeout_s=PATIENCE_S)
    second.start(timeout_s=PATIENCE_S)
    until(lambda: "another client has connected as 'twice'; give each a name of its own" in caplog.text)
    first.stop()
    second.stop()
