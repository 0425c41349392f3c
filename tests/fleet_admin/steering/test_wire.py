import pytest

from fleet_admin.steering.wire import SteeringWire
from schemas.control import DesiredSettings
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink

FLEET = "home"


def wanted(number: int) -> DesiredSettings:
    return DesiredSettings(id=f"{number:08x}", values={"top_k": number})


def monitor(broker: MemoryBroker, name: str) -> tuple[MemoryLink, SteeringWire]:
    link = MemoryLink(broker, name)
    wire = SteeringWire(link, fleet=FLEET, name=name)
    link.start(timeout_s=1.0)
    return link, wire


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


def test_own_settings_count_before_and_after_they_come_back(broker: MemoryBroker) -> None:
    _, wire = monitor(broker, "monitor")
    broker.pump()
    for number in (1, 2):
        wire.want("gw-1", wanted(number))
        assert wire.desired() == {"gw-1": wanted(number)}
    while broker.step():
        assert wire.desired() == {"gw-1": wanted(2)}


def test_settings_of_another_monitor_count_if_the_broker_has_them_last(broker: MemoryBroker) -> None:
    _, wire = monitor(broker, "monitor")
    _, other = monitor(broker, "desk")
    broker.pump()
    other.want("gw-1", wanted(1))
    wire.want("gw-1", wanted(2))
    while broker.step():
        assert wire.desired() == {"gw-1": wanted(2)}
    assert other.desired() == {"gw-1": wanted(2)}
    other.want("gw-1", wanted(3))
    broker.pump()
    assert wire.desired() == other.desired() == {"gw-1": wanted(3)}
    other.forget("gw-1")
    broker.pump()
    assert wire.desired() == other.desired() == {}


def test_after_a_reconnect_what_the_broker_retains_counts(broker: MemoryBroker) -> None:
    _, wire = monitor(broker, "monitor")
    _, other = monitor(broker, "desk")
    broker.pump()
    wire.want("gw-1", wanted(1))
    broker.kill("monitor")  # before its own settings have come back
    other.want("gw-1", wanted(2))
    broker.revive("monitor")
    broker.pump()
    assert wire.desired() == {"gw-1": wanted(2)}
