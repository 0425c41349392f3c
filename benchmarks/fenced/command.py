"""Fenced-device benchmark: what the messages of a device that is shut out cost the edge, in shares of one core.

A real mosquitto, a real edge process over a scripted target, and one device whose fence lasts: it goes on sending
drafts at a rate, at QoS 0 and 1, over plain TCP and mutual TLS. In one run are measured: the edge while nothing comes;
the edge under the flood, thread by thread; and a bare reader that takes the same flood from the broker and looks at
none of it, the least that anybody pays for being sent it.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from benchmarks.fenced.connecting import Access, drain
from benchmarks.fenced.thread_meter import thread_times_s
from benchmarks.shared.conditions import conditions
from benchmarks.shared.identity import Identity
from benchmarks.shared.processes import BenchError, Cores, Program
from broker_config.broker import Broker
from broker_config.errors import BrokerError
from broker_config.processes.local import LocalBroker
from broker_config.processes.runner import MosquittoProcess, ThrowAwayBroker
from fleet_cli.broker.init import make_local_broker
from schemas.codec import encode_draft
from schemas.errors import FleetError
from schemas.messages import Draft
from schemas.topics import Topic, build, wildcard
from tests.support.mqtt_packets import publish_packet

__all__ = ["Cost", "main"]

FLEET: Final = "home"
EDGE, READER, DEVICE = "edge-1", "edge-reader", "device-1"
TURN_S: Final = 0.005
ONLINE_S: Final = 60.0
SETTLE_S: Final = 3.0  # the device is fenced, and the edge has said so
FENCE_S: Final = 3600.0
BOUND: Final = 0.01  # of one core
DRAFT: Final = encode_draft(
    Draft(handle=7, round=1, epoch=0, base=9, fix=1, tokens=(1, 2, 3, 4, 5), counts=(30_000,) * 5, digest=1)
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Shares of one core.

    Attributes:
        tls: Whether over mutual TLS.
        qos: Of the flood.
        sent_per_s: What came of the flood.
        idle: The edge's, while nothing comes.
        flooded: The edge's, under the flood.
        threads: Likewise what the flood adds, by thread; those of 0.1 % and more, the greatest first.
        bare_reader: Of a reader that looks at nothing (QoS 0), at the same rate.
    """

    tls: bool
    qos: int
    sent_per_s: float
    idle: float
    flooded: float
    threads: tuple[float, ...]
    bare_reader: float

    @property
    def added(self) -> float:
        """What the fenced device costs."""
        return self.flooded - self.idle


class _Flood:
    """One device that sends the same packet at a rate, on a thread. A context manager."""

    def __init__(self, access: Access, packet: bytes, *, rate: float) -> None:
        self.sent = 0
        self._sock = access.connect()
        self._packet = packet
        self._rate = rate
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._send, name="flood", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._sock.close()

    def _send(self) -> None:
        began = time.monotonic()
        while not self._stopping.wait(TURN_S):
            due = int((time.monotonic() - began) * self._rate) - self.sent
            self._sock.settimeout(ONLINE_S)
            self._sock.sendall(self._packet * due)
            self.sent += due
            self._sock.settimeout(0.0)
            drain(self._sock)


@contextlib.contextmanager
def _broker(folder: Path, *, tls: bool) -> Iterator[ThrowAwayBroker]:
    if tls:
        make_local_broker(folder / "broker", fleet=FLEET, edges=[EDGE, READER], devices=[DEVICE], port=8883)
        with LocalBroker(folder / "broker", port=0) as local:
            yield local
    else:
        with MosquittoProcess(Broker(fleet=FLEET, edges=(EDGE, READER))) as plain:
            yield plain


def _access(broker: ThrowAwayBroker, name: str) -> Access:
    port = broker.broker.port_of(name)
    if not isinstance(broker, LocalBroker):
        return Access(name, port)
    files = broker.identity(name)
    identity = Identity(name, broker.host, port, str(files.ca), str(files.certificate), str(files.key))
    return Access(name, port, identity)


def _edge(access: Access, folder: Path, cores: Cores) -> Program:
    settings = {"host": "127.0.0.1", "port": access.port}
    if access.identity is not None:
        settings |= {key: str(value) for key, value in access.identity.settings().items() if key != "port"}
    lines = [
        f'fleet = "{FLEET}"',
        f'edge = "{EDGE}"',
        f'db = "sqlite:///{folder}/log.sqlite3"',
        f'spool = "{folder}/spool"',
        "[fence]",
        "strikes = 50",
        f"first_s = {FENCE_S}",
        "[broker]",
        *(f"{key} = {json.dumps(value)}" for key, value in settings.items()),
    ]
    config = folder / "edge.toml"
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Program("tests.support.scripted_edge_process", [str(config)], cores=cores.edge, log=folder / "edge.log")


def _shares(pid: int, seconds: float) -> dict[int, float]:
    """Return what each thread of a process takes of one core in the seconds to come."""
    before, began = thread_times_s(pid), time.monotonic()
    time.sleep(seconds)
    after, wall_s = thread_times_s(pid), time.monotonic() - began
    return {thread: (time_s - before.get(thread, 0.0)) / wall_s for thread, time_s in after.items()}


def _measure(folder: Path, *, tls: bool, rate: float, seconds: float, cores: Cores) -> Iterator[Cost]:
    with _broker(folder, tls=tls) as broker, contextlib.ExitStack() as stack:
        device = _access(broker, DEVICE)
        to_reader = publish_packet(build(Topic.DRAFT, fleet=FLEET, device=DEVICE, edge=READER), DRAFT, qos=0)
        reader = Program("benchmarks.fenced.reader", cores=cores.edge, log=folder / "reader.log")
        stack.callback(reader.end)
        reader_filter = wildcard(Topic.DRAFT, fleet=FLEET, edge=READER)
        reader.tell(json.dumps({"access": _access(broker, READER).to_dict(), "filter": reader_filter}))
        reader.wait_for("reading", timeout_s=ONLINE_S)
        with _Flood(device, to_reader, rate=rate):
            bare = sum(_shares(reader.pid, seconds).values())
        reader.end()
        edge = _edge(_access(broker, EDGE), folder, cores)
        stack.callback(edge.end)
        edge.wait_for('"online"', timeout_s=ONLINE_S)
        time.sleep(SETTLE_S)
        idle = _shares(edge.pid, seconds)
        for qos in (0, 1):
            packet = publish_packet(build(Topic.DRAFT, fleet=FLEET, device=DEVICE, edge=EDGE), DRAFT, qos=qos)
            with _Flood(device, packet, rate=rate) as flood:
                time.sleep(SETTLE_S)
                sent, began = flood.sent, time.monotonic()
                flooded = _shares(edge.pid, seconds)
                sent_per_s = (flood.sent - sent) / (time.monotonic() - began)
            added = sorted((share - idle.get(thread, 0.0) for thread, share in flooded.items()), reverse=True)
            yield Cost(
                tls=tls,
                qos=qos,
                sent_per_s=round(sent_per_s, 1),
                idle=round(sum(idle.values()), 5),
                flooded=round(sum(flooded.values()), 5),
                threads=tuple(round(share, 5) for share in added if share >= 0.001),
                bare_reader=round(bare, 5),
            )
        if not edge.lives or "shut out" not in edge.log.read_text():
            raise BenchError(f"The edge has not shut the device out; see {edge.log}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the costs; return 0 if each is within the bound or the bare reader's, 1 if not, 2 without any."""
    parser = argparse.ArgumentParser(prog="benchmarks fenced", description=__doc__)
    parser.add_argument("--rate", type=float, default=2000.0, help="messages a second (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args(argv)
    cores = Cores.choose(os.sched_getaffinity(0), apart=True)
    before = os.sched_getaffinity(0)
    costs: list[Cost] = []
    print("       QoS  sent/s   idle  flooded  the fenced device costs  by thread          bare reader")
    try:
        os.sched_setaffinity(0, cores.others)
        for tls in (False, True):
            with tempfile.TemporaryDirectory(prefix="fleet-fenced-") as folder:
                for cost in _measure(
                    Path(folder), tls=tls, rate=arguments.rate, seconds=arguments.seconds, cores=cores
                ):
                    costs.append(cost)
                    print(_line(cost), flush=True)
    except (FleetError, BrokerError) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        os.sched_setaffinity(0, before)
    if arguments.json is not None:
        content = {
            "costs": [{**asdict(cost), "added": round(cost.added, 5)} for cost in costs],
            **conditions("paho-mqtt", broker=True),
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if all(cost.added <= BOUND for cost in costs) else 1


def _line(cost: Cost) -> str:
    threads = " ".join(f"{100 * share:.2f} %" for share in cost.threads) or "-"
    return (
        f"{'TLS' if cost.tls else 'plain':>5} {cost.qos:4} {cost.sent_per_s:7.0f} {100 * cost.idle:4.2f} %"
        f" {100 * cost.flooded:6.2f} % {100 * cost.added:23.2f} %  {threads:18} {100 * cost.bare_reader:10.2f} %"
    )


if __name__ == "__main__":
    sys.exit(main())
