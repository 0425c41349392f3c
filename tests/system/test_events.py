import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from fleet_common.logs import Event, read_events
from tests.support.prepared_models import prepared
from tests.support.waiting import PATIENCE_S, wait_for_event

pytestmark = [pytest.mark.broker, pytest.mark.models]

FLEET = "told"


def started(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "fleet_cli.main", *arguments, "--events", "--fleet", FLEET]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


@pytest.fixture
def own_broker() -> Iterator[MosquittoProcess]:
    with MosquittoProcess(Broker(fleet=FLEET)) as broker:
        yield broker


def test_an_edge_and_a_device_tell_of_their_lives(own_broker: MosquittoProcess, tmp_path: Path, dtype: str) -> None:
    target, port = prepared("target"), str(own_broker.port)
    edge = started(
        "edge", "run", "--port", port, "--target", str(target), "--engine", "torch", "--dtype", dtype,
        "--db", f"sqlite:///{tmp_path / 'fleet.sqlite3'}", "--spool", str(tmp_path / "spool"),
    )  # fmt: skip
    device = started(
        "device", "run", "--port", port, "--api-listen", "", "--drafter", "suffix",
        "--model", str(prepared("Q4_0.gguf")),
    )  # fmt: skip
    try:
        assert edge.stdout is not None
        assert device.stdout is not None
        assert wait_for_event(edge.stdout, Event.LOADING) == {"event": "loading", "target": str(target)}
        online = wait_for_event(edge.stdout, Event.ONLINE)
        assert online is not None
        assert (online["fleet"], online["edge"], online["port"]) == (FLEET, "edge-1", own_broker.port)
        assert online["target"] == target.parent.name
        assert dtype in online["runs_on"]
        assert online["context"] > 0
        assert online["vocabulary"]
        assert "fleet.sqlite3" in online["database"]
        edge.send_signal(signal.SIGTERM)
        assert list(read_events(edge.stdout)) == [
            {"event": "draining", "sessions": 0},
            {"event": "stopped", "handed_over": 0},
        ]
        assert edge.wait(PATIENCE_S) == 0
        device.send_signal(signal.SIGTERM)
        told = list(read_events(device.stdout))
        assert device.wait(PATIENCE_S) == 0
    finally:
        for process in (edge, device):
            process.kill()
            process.communicate()
    # The connection may be up before the service; its end is not counted as a loss.
    assert sorted(names(told)[:3]) == [Event.LOADING, Event.ONLINE, Event.SERVING]
    assert names(told)[3:] == [Event.DRAINING, Event.STOPPED]
    assert {"event": "online", "host": "127.0.0.1", "port": own_broker.port} in told
