"""The rendered firewall in the kernel: what one address may do at the broker, and who reaches the edges' port.

Two network namespaces with a cable between them stand for the broker's machine and all others; needs root and nft.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from broker_config.broker import Broker
from broker_config.files import TABLE, render_rules
from tests.support.waiting import PATIENCE_S, until

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(
        os.geteuid() != 0 or not (shutil.which("nft") and shutil.which("ip")), reason="needs root, nft and ip"
    ),
]

BROKER, EDGE, DEVICE, OTHER = "192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"
DESCRIPTION = Broker.production(
    edge_networks=[EDGE],
    max_device_connections=4,
    max_device_bytes_per_s=1024,
    max_device_burst_bytes=64 << 10,
)
SERVE = """
import selectors, socket, sys
selector = selectors.DefaultSelector()
for port in sys.argv[1:]:
    selector.register(socket.create_server(("", int(port)), backlog=64), selectors.EVENT_READ)
print("ready", flush=True)
held = []
while True:
    for key, _ in selector.select():
        held.append(key.fileobj.accept()[0])
"""
KNOCK = """
import json, socket, struct, sys
address, host, port, count, hold = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
held, results = [], []
for _ in range(count):
    try:
        sock = socket.create_connection((host, int(port)), timeout=5, source_address=(address, 0))
        results.append("open")
        # What is not held ends at once, on both sides.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        held.append(sock) if hold else sock.close()
    except ConnectionRefusedError:
        results.append("refused")
print(json.dumps(results), flush=True)
sys.stdin.read()
"""
POUR = """
import socket, sys
sock = socket.create_connection((sys.argv[2], int(sys.argv[3])), timeout=5, source_address=(sys.argv[1], 0))
sock.setblocking(False)
try:
    while True:
        sock.send(bytes(1 << 16))
except BlockingIOError:
    print("full", flush=True)
sys.stdin.read()
"""


@dataclass(slots=True)
class Cable:
    name: str
    stack: ExitStack

    def on_broker(self, *command: str, text: str | None = None) -> str:
        full = ["ip", "netns", "exec", f"{self.name}-b", *command]
        return subprocess.run(full, input=text, capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout

    def load(self, description: Broker) -> None:
        self.on_broker("nft", "-f", "-", text=render_rules(description))

    def start(self, side: str, program: str, *arguments: object) -> str:
        command = ["ip", "netns", "exec", f"{self.name}-{side}", sys.executable, "-c", program, *map(str, arguments)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.stack.callback(process.communicate, timeout=PATIENCE_S)
        self.stack.callback(process.terminate)
        assert process.stdout is not None
        return process.stdout.readline()

    def knock(self, address: str, port: int, *, count: int = 1, hold: bool = True) -> list[str]:
        results = json.loads(self.start("d", KNOCK, address, BROKER, port, count, int(hold)))
        assert isinstance(results, list)
        return results


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


def addresses(cable: Cable, side: str, given: Sequence[str]) -> None:
    for address in given:
        ip("-n", f"{cable.name}-{side}", "address", "add", f"{address}/24", "dev", f"to-{side}")
    for link in (f"to-{side}", "lo"):
        ip("-n", f"{cable.name}-{side}", "link", "set", link, "up")


@contextmanager
def laid_cable(name: str) -> Iterator[Cable]:
    """Two network namespaces, `b` and `d`, with a cable between them; skips where there can be none."""
    with ExitStack() as stack:
        made = Cable(f"{name}-{uuid.uuid4().hex[:8]}", stack)
        for side in "bd":
            try:
                ip("netns", "add", f"{made.name}-{side}")
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr!r}")
            stack.callback(ip, "netns", "delete", f"{made.name}-{side}")
        ends = ["to-b", "netns", f"{made.name}-b", "type", "veth", "peer", "name", "to-d", "netns", f"{made.name}-d"]
        ip("link", "add", *ends)
        yield made


@pytest.fixture
def cable() -> Iterator[Cable]:
    with laid_cable("fw") as made:
        addresses(made, "b", [BROKER])
        addresses(made, "d", [EDGE, DEVICE, OTHER])
        made.load(DESCRIPTION)
        assert made.start("b", SERVE, DESCRIPTION.port, DESCRIPTION.edge_port) == "ready\n"
        yield made


def test_one_address_holds_so_many_connections_and_costs_others_none(cable: Cable) -> None:
    assert cable.knock(DEVICE, DESCRIPTION.port, count=7) == ["open"] * 4 + ["refused"] * 3
    assert cable.knock(OTHER, DESCRIPTION.port, count=4) == ["open"] * 4


def test_one_address_makes_so_many_connections_in_a_minute(cable: Cable) -> None:
    cable.load(DESCRIPTION.model_copy(update={"max_device_connections": 100, "max_device_connections_per_minute": 20}))
    results = cable.knock(DEVICE, DESCRIPTION.port, count=40, hold=False)
    assert results[:20] == ["open"] * 20
    assert "refused" in results[20:]
    assert cable.knock(OTHER, DESCRIPTION.port) == ["open"]


def test_what_one_address_sends_beyond_the_rate_is_dropped(cable: Cable) -> None:
    assert cable.start("d", POUR, DEVICE, BROKER, DESCRIPTION.port) == "full\n"

    def dropped() -> int:
        rules = json.loads(cable.on_broker("nft", "-j", "list", "chain", *TABLE.split(), "device_port"))["nftables"]
        expressions = [each["rule"]["expr"] for each in rules if "rule" in each]
        return sum(
            part["counter"]["packets"]
            for rule in expressions
            if {"drop": None} in rule
            for part in rule
            if "counter" in part
        )

    until(lambda: dropped() > 0)


def test_the_edges_port_is_for_the_addresses_that_are_named(cable: Cable) -> None:
    assert cable.knock(EDGE, DESCRIPTION.edge_port, count=10) == ["open"] * 10
    assert cable.knock(DEVICE, DESCRIPTION.edge_port) == ["refused"]
