import queue
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from fleet_cli.demo import DemoProgress, _follow
from fleet_cli.demo_processes import DemoBroker
from fleet_cli.errors import CommandError


class Edge:
    cause = "its own words"

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def end(self) -> None:
        self.process.wait()


@pytest.fixture
def edge() -> Iterator[Edge]:
    running = Edge()
    yield running
    running.process.communicate()


def follow(edge: Edge, lives: Callable[[], bool]) -> None:
    watch = DemoProgress(Console(quiet=True), 8, show_text=False)
    place = DemoBroker("mosquitto 127.0.0.1:1", "127.0.0.1", 1, lives=lives)
    _follow({"device-1": edge}, queue.SimpleQueue(), watch, edge=edge, place=place)  # type: ignore[dict-item,arg-type]


@pytest.mark.timeout(20)
def test_a_broker_that_has_ended_ends_the_demo(edge: Edge) -> None:
    with pytest.raises(CommandError, match="mosquitto"):
        follow(edge, lambda: False)


@pytest.mark.timeout(20)
def test_an_edge_that_has_ended_ends_the_demo(edge: Edge) -> None:
    edge.process.kill()
    edge.process.wait()
    with pytest.raises(CommandError, match="ended"):
        follow(edge, lambda: True)
