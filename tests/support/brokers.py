"""Fixtures of real brokers and free ports, imported by `tests/conftest.py`."""

from collections.abc import Callable, Iterator

import pytest

from broker_config.broker import Broker, BrokerMissing
from broker_config.processes import MosquittoProcess, find_mosquitto, reserved_port
from tests.support.needs import missing, require_marker

StartBroker = Callable[[Broker], MosquittoProcess]


def require_mosquitto() -> None:
    """Skip the test where mosquitto is not installed; fail it on a CI machine, which must have it."""
    try:
        find_mosquitto()
    except BrokerMissing as error:
        missing(str(error))
    require_marker("broker")


@pytest.fixture
def free_port() -> Iterator[int]:
    """Return a port of loopback that no other program gets while the test lasts, but one that is told its number."""
    with reserved_port() as port:
        yield port


@pytest.fixture(scope="session")
def mosquitto() -> Iterator[MosquittoProcess]:
    """Return a broker that all tests share: use unique names, and leave it running."""
    require_mosquitto()
    with MosquittoProcess(Broker()) as process:
        yield process


@pytest.fixture
def start_mosquitto() -> Iterator[StartBroker]:
    """Return a function that starts brokers for this test alone, which may stop and restart them."""
    require_mosquitto()
    started: list[MosquittoProcess] = []

    def start(broker: Broker) -> MosquittoProcess:
        process = MosquittoProcess(broker)
        started.append(process)
        process.start()
        return process

    yield start
    for process in started:
        process.close()


@pytest.fixture
def own_mosquitto(start_mosquitto: StartBroker) -> MosquittoProcess:
    return start_mosquitto(Broker())
