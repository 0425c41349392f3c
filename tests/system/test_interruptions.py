import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from broker_config.processes import MosquittoProcess
from fleet_device.settings import OfflinePolicy
from tests.support.served_device import Served, device_at, scripted_whole
from tests.support.waiting import PATIENCE_S, until

pytestmark = [pytest.mark.broker]

CLIENTS = 2


class Clients:
    """Applications that each send one completion request after another, on a thread."""

    def __init__(self, url: str) -> None:
        self.answers = Counter[int]()
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]

    @contextmanager
    def asking(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def until_answered(self, more: int) -> None:
        wanted = self.answers.total() + more
        until(lambda: self.answers.total() >= wanted)

    def _ask(self) -> None:
        body = {"prompt": "t1 t2 t3", "max_tokens": 40}
        while not self._stop.is_set():
            self.answers[httpx.post(f"{self._url}/completions", json=body, timeout=PATIENCE_S).status_code] += 1


def interrupted(served: Served) -> None:
    """Return once the device misses broker or edge, while all clients wait for an answer."""
    gateway = served.gateway
    until(lambda: gateway.absence() is not None)
    until(lambda: gateway.health()["sessions"]["writing"] == CLIENTS)


@pytest.mark.parametrize("what", ["broker", "edge"])
def test_a_restart_ends_no_request(own_mosquitto: MosquittoProcess, tmp_path: Path, what: str) -> None:
    whole = scripted_whole(own_mosquitto.port, tmp_path)
    with ExitStack() as stack:
        edge = stack.enter_context(ExitStack())
        edge.enter_context(whole.edge())
        served = stack.enter_context(device_at(whole, offline_s=PATIENCE_S, answer_s=PATIENCE_S))
        assert served.gateway.service.settings.offline is OfflinePolicy.FAIL
        clients = Clients(served.url)
        stack.enter_context(clients.asking())
        clients.until_answered(2 * CLIENTS)
        if what == "broker":
            own_mosquitto.stop()
            interrupted(served)
            own_mosquitto.start()
        else:
            edge.close()
            interrupted(served)
            edge.enter_context(whole.edge())
        clients.until_answered(2 * CLIENTS)
    assert set(clients.answers) == {200}
