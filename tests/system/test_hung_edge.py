import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from broker_config.broker import Broker
from fleet_device.settings import OfflinePolicy
from schemas.policy import Mode, SamplingPolicy
from tests.support.brokers import StartBroker
from tests.support.processes import BrokerClient, Program, scripted_edge
from tests.support.scripted_language import reference_text
from tests.support.served_device import ReadingDrafter, device_at, scripted_whole
from tests.support.waiting import PATIENCE_S
from tests.support.whole import FLEET

pytestmark = pytest.mark.broker

ASKED: Final[dict[str, Any]] = {
    "prompt": "t1 t2 t3", "max_tokens": 2000, "mode": "coupled", "temperature": 0.8, "top_k": 20, "seed": 5,
    "stream": True,
}  # fmt: skip


@contextmanager
def edge_of(folder: Path, port: int, name: str) -> Iterator[Program]:
    own, cores = folder / name, os.sched_getaffinity(0)
    own.mkdir()
    with scripted_edge(BrokerClient(name, "127.0.0.1", port), fleet=FLEET, folder=own, cores=cores) as program:
        yield program
        program.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("rescued_by", ["itself", "another edge"])
def test_a_stream_goes_on_after_its_edge_has_hung(
    start_mosquitto: StartBroker, tmp_path: Path, rescued_by: str
) -> None:
    """Where there is no other edge, it says why it waits."""
    whole = scripted_whole(start_mosquitto(Broker(edges=("edge-1", "edge-2"))).port, tmp_path)
    text, comments = "", list[str]()
    with (
        ExitStack() as stack,
        edge_of(tmp_path, whole.port, "edge-1") as edge,
        device_at(whole, answer_s=2.0, offline=OfflinePolicy.WAIT) as served,
        httpx.stream("POST", f"{served.url}/completions", json=ASKED, timeout=PATIENCE_S) as reply,
    ):
        for line in reply.iter_lines():
            if line.startswith(":"):
                comments.append(line)
                if "edge-1" in line:
                    edge.send_signal(signal.SIGCONT)
            elif line.startswith("data: {"):
                begun, (choice,) = bool(text), json.loads(line.removeprefix("data: "))["choices"]
                text += choice["text"]
                if text and not begun:
                    edge.send_signal(signal.SIGSTOP)
                    if rescued_by == "another edge":
                        stack.enter_context(edge_of(tmp_path, whole.port, "edge-2"))
    policy = SamplingPolicy(mode=Mode.COUPLED, temperature=0.8, top_k=20, top_p=0.95, seed=5)
    codec = ReadingDrafter().codec
    tokens = reference_text(codec.encode("t1 t2 t3"), policy, 2000)
    assert (text, choice["finish_reason"]) == (b"".join(map(codec.piece, tokens)).decode(), "length")
    assert rescued_by != "itself" or ": waiting" in comments
