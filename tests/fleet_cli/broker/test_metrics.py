import http.client

import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker_config.broker import Broker
from broker_config.monitoring import BROKER_CATALOGUE, BrokerFigures
from fleet_cli.broker import broker_settings
from fleet_common.metrics import ListenAddress
from fleet_common.metrics_server import MetricsServer
from fleet_common.mqtt.link import Message
from fleet_common.mqtt.paho_link import PahoLink
from tests.support.brokers import StartBroker
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink
from tests.support.waiting import until


def told(figures: BrokerFigures) -> dict[str, float]:
    return {family.metric.name: family.values[()] for family in figures.families()}


@pytest.fixture
def figures() -> BrokerFigures:
    link = MemoryLink(MemoryBroker(), "monitor")
    link.start(timeout_s=1.0)
    return BrokerFigures(link)


def test_numbers_are_taken_and_all_else_is_passed_over(figures: BrokerFigures) -> None:
    for topic, payload in {
        "$SYS/broker/clients/connected": b"12",
        "$SYS/broker/uptime": b"3600 seconds",
        "$SYS/broker/messages/sent": b"nan",
        "$SYS/broker/messages/received": b"-1",
        "$SYS/broker/heap/current": b"9" * 10_000,
        "$SYS/broker/bytes/sent": b"\xff\x00",
        "$SYS/broker/version": b"2",
        "elsewhere": b"1",
    }.items():
        figures.take(Message(topic, payload))
    found = told(figures)
    assert found == {"dssd_broker_up": 1.0, "dssd_broker_clients_connected": 12.0, "dssd_broker_uptime_seconds": 3600.0}


@pytest.mark.broker
def test_a_real_broker_tells_all_of_them(start_mosquitto: StartBroker) -> None:
    mosquitto = start_mosquitto(Broker(sys_interval_s=1))
    link = PahoLink(broker_settings(host="127.0.0.1", port=mosquitto.port).link("_broker", "monitor", will=None))
    figures = BrokerFigures(link)
    figures.subscribe()
    server = MetricsServer(ListenAddress("127.0.0.1", 0), figures.pages())
    link.start(timeout_s=10.0)
    server.start()
    try:
        until(lambda: len(told(figures)) == len(BROKER_CATALOGUE), patience_s=30.0)
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
    finally:
        server.stop()
        link.stop()
    read = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    assert read["dssd_broker_clients_connected"] >= 1
    assert read["dssd_broker_up"] == 1
