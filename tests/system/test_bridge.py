import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_config.broker import REPORTED, Broker, render_description
from broker_config.checks.trial import BrokerTrial, begin_trial
from broker_config.files import Profile, render_files, write_files
from broker_config.mosquitto import render_site_access
from broker_config.processes import LocalBroker
from broker_config.site import make_local_broker
from fleet_common.mqtt.link import publish_confirmed
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings, TlsSettings
from schemas.topics import ROOT, TREE, ClientRole, TopicRule
from tests.support.brokers import require_mosquitto
from tests.support.links import START_S, Inbox
from tests.support.waiting import until

pytestmark = pytest.mark.broker

FLEET, SITE = "plant", "north"


@pytest.fixture
def office(tmp_path: Path) -> Iterator[BrokerTrial]:
    require_mosquitto()
    description = Broker.production(fleet="office", edges=(), monitors=("reader",))
    texts = {file.name: file.text for file in render_files(description, Profile.PRODUCTION, home=tmp_path)}
    access = f"{texts['access.acl']}\n{render_site_access(site_description(8883))}"
    with begin_trial(texts["mosquitto.conf"], access, description, tmp_path / "office") as trial:
        yield trial


def site_description(port: int) -> Broker:
    return Broker.production(
        fleet=FLEET, host="127.0.0.1", head_office={"host": "127.0.0.1", "port": port, "site": SITE}
    )


def join(folder: Path, office: BrokerTrial) -> None:
    made = LocalBroker(folder).broker
    files = office.identity(SITE)
    for source, name in ((files.ca, "head-office-ca.pem"), (files.certificate, "site.pem"), (files.key, "site.key")):
        shutil.copyfile(source, folder / name)
    broker = made.model_copy(update={"head_office": site_description(office.broker.port).head_office})
    write_files(render_files(broker, Profile.BRIDGE, home=folder), folder)
    assert "head_office" in render_description(broker)


def link_to(broker: LocalBroker, name: str) -> PahoLink:
    files = broker.identity(name)
    tls = TlsSettings(files.ca, files.certificate, files.key)
    return PahoLink(LinkSettings(client_id=name, port=broker.port, tls=tls))


def topic_of(rule: TopicRule) -> str:
    return f"{ROOT}/{FLEET}/{rule.template.format(device='device-1', edge='edge-1')}"


def test_the_head_office_gets_what_is_reported_and_nothing_else(office: BrokerTrial, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    make_local_broker(folder, fleet=FLEET, edges=["edge-1"], devices=["device-1"], port=18_886)
    join(folder, office)
    inbox = Inbox()
    with LocalBroker(folder, port=0) as site:
        reader = office.connect("trial-inspector", client_id="reader")
        reader.subscribe("#", inbox)
        links = {role: link_to(site, name) for role, name in NAMES.items()}
        for link in links.values():
            link.start(timeout_s=START_S)
        assert office.broker.await_log(f"as {SITE}"), "the site's bridge has connected"
        for rule in TREE:
            writer = next(role for role in ClientRole if role in rule.writers)
            publish_confirmed(links[writer], topic_of(rule), rule.topic.value.encode(), timeout_s=START_S)
        reported = {topic_of(rule) for rule in TREE if rule.topic in REPORTED}
        until(lambda: {message.topic for message in inbox} >= reported)
        # The other way would lead through the office's broker, to which only the site writes.
        assert {message.topic for message in inbox} == reported
        for link in links.values():
            link.stop()


def test_another_site_cannot_report_in_this_ones_name(office: BrokerTrial) -> None:
    inbox = Inbox()
    reader = office.connect("trial-inspector", client_id="reader")
    reader.subscribe("#", inbox)
    rule = TREE[0]
    other, own = office.connect("south"), office.connect(SITE)
    other.publish(topic_of(rule), b"forged")
    publish_confirmed(own, topic_of(rule), b"true", timeout_s=START_S)
    until(lambda: inbox.payloads == [b"true"])


NAMES = {ClientRole.DEVICE: "device-1", ClientRole.EDGE: "edge-1", ClientRole.MONITOR: "monitor"}
