import shutil
import subprocess
from pathlib import Path

import pytest

from broker_config.mosquitto import janitor_command
from fleet_common.identity.certificates import IdentityRole
from fleet_common.mqtt.link import Message
from fleet_common.mqtt.settings import TlsSettings
from schemas.topics import ROOT, TREE, ClientRole, Topic, build, wildcard
from tests.support.links import START_S, Inbox
from tests.support.needs import missing
from tests.support.raw_client import RawClient
from tests.support.tls_fleet import FLEET, HOST, TlsFleet, tls_fleet
from tests.support.waiting import PATIENCE_S, until

pytestmark = pytest.mark.broker

DEVICES = ("device-1", "device-2", "device-3")
EDGE, JANITOR = "edge-1", "monitor-janitor"
LARGE = bytes(1 << 19)


def topics(device: str, *, retained: bool) -> list[str]:
    """Return the topics that a device writes, with retained messages or the others."""
    return [
        f"{ROOT}/{FLEET}/{rule.template.format(device=device, edge=EDGE)}"
        for rule in TREE
        if rule.writers == {ClientRole.DEVICE} and rule.retained == retained
    ]


def credentials(fleet: TlsFleet) -> Path:
    folder = fleet.folder / "janitor"
    folder.mkdir()
    tls = fleet.enrol(JANITOR, IdentityRole.MONITOR)
    assert tls.certificate is not None
    assert tls.key is not None
    for source, name in ((tls.ca, "ca.pem"), (tls.certificate, "janitor.pem"), (tls.key, "janitor.key")):
        shutil.copyfile(source, folder / name)
    return folder


def clear(fleet: TlsFleet, folder: Path, program: str) -> list[str]:
    broker = fleet.broker.broker.model_copy(update={"public_name": HOST})
    command = janitor_command(broker, folder=str(folder), program=program)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode in {0, 27}, done.stderr
    return done.stdout.splitlines()


def kept(fleet: TlsFleet, tls: TlsSettings) -> dict[str, Message]:
    """Return what the broker retains of devices, as seen by an edge that subscribes to all it may read."""
    inbox = Inbox()
    link = fleet.link(tls, EDGE, port=fleet.broker.edge_port)
    for rule in TREE:
        link.subscribe(wildcard(rule.topic, fleet=FLEET), inbox)
    link.start(timeout_s=START_S)
    mark = build(Topic.EDGE_STATE, fleet=FLEET, edge=EDGE)
    link.subscribe(mark, inbox)
    link.publish(mark, b"mark")
    until(lambda: b"mark" in inbox.payloads)
    link.stop()
    return {message.topic: message for message in inbox if message.retained}


def test_it_clears_what_devices_left_and_keeps_what_is_meant_to_be_kept(tmp_path: Path) -> None:
    program = shutil.which("mosquitto_sub") or missing("mosquitto_sub is not installed: install mosquitto-clients.")
    with tls_fleet(tmp_path) as fleet:
        left = [topic for device in DEVICES for topic in topics(device, retained=False)]
        states = [topic for device in DEVICES for topic in topics(device, retained=True)]
        for device in DEVICES:
            with RawClient(fleet.broker.port, fleet.enrol(device), device) as client:
                for topic in topics(device, retained=False):
                    client.publish(topic, LARGE, retain=True)
                for topic in topics(device, retained=True):
                    client.publish(topic, b"kept", retain=True)
        edge, folder = fleet.enrol(EDGE, IdentityRole.EDGE), credentials(fleet)
        readable = {topic for topic in left if "/up/" in topic}
        assert readable <= set(kept(fleet, edge)), "or there is nothing to clear"

        assert sorted(clear(fleet, folder, program)) == sorted(left)
        after = kept(fleet, edge)
        assert not readable & set(after)
        assert {topic for topic in states if topic.endswith("/state")} <= set(after)
