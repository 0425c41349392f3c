"""An edge as a process whose wall clock is set forward and back by an hour and by a year."""

import os
import secrets
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from broker_config.broker import Broker
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.client.agent import Agent
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.pacing.contract import FixedPacing
from fleet_device.requests.generate import GenerateRequest
from fleet_edge.session_log.log import SessionLog
from schemas.codec import encode_open
from schemas.messages import Open
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason
from schemas.topics import Topic, build
from schemas.vocabulary import Vocabulary
from tests.support.brokers import StartBroker
from tests.support.needs import missing
from tests.support.processes import BrokerClient, quota_variables, scripted_edge
from tests.support.raw_client import RawClient
from tests.support.scripted_language import LANGUAGE, draft_language
from tests.support.waiting import PATIENCE_S, until

FLEET, EDGE = "north", "edge-1"
SILENT = 8
REQUESTS, LENGTH = 5, 40
HOUR_S, YEAR_S = 3600, 365 * 86_400
SOURCE = Path(__file__).parents[1] / "support" / "stepped_clock.c"
POLICY = SamplingPolicy(mode=Mode.COUPLED, seed=7)


class SteppedClock:
    """The wall clock of a process that runs with `environment`."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or missing("There is no C compiler.")
        library, self._file = folder / "clock.so", folder / "ahead"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
        self._file.write_bytes(struct.pack("q", 0))
        self.environment = {"LD_PRELOAD": str(library), "FLEET_TESTING_STEP": str(self._file)}

    def set(self, ahead_s: int) -> None:
        with self._file.open("r+b") as file:  # in place: it is mapped
            os.pwrite(file.fileno(), struct.pack("q", ahead_s), 0)


@contextmanager
def talker(port: int) -> Iterator[Callable[[int], None]]:
    """Return a function with which a device generates a number of requests."""
    link = PahoLink(BrokerSettings(port=port).link(FLEET, "talker", will=None))
    drafter = ScriptedDrafter(draft_language(), LANGUAGE.words)
    agent = Agent(link, FLEET, "talker", drafter, FixedPacing(), time.monotonic)
    agent.attach()
    link.start(timeout_s=PATIENCE_S)

    def talk(requests: int) -> None:
        for _ in range(requests):
            agent.generate(GenerateRequest((1, 2, 3), policy=POLICY, max_new_tokens=LENGTH))

    try:
        yield talk
    finally:
        link.stop()
        agent.close()


def open_silent_sessions(client: RawClient, name: str) -> set[str]:
    ids = [secrets.token_bytes(8) for _ in range(SILENT)]
    for session in ids:
        message = Open(
            session=session,
            vocabulary=Vocabulary.of(LANGUAGE.words),
            draft_model="none",
            quantization="none",
            policy=POLICY,
            prompt=(1, 2, 3),
            max_new_tokens=LENGTH,
        )
        client.publish(build(Topic.OPEN, fleet=FLEET, device=name), encode_open(message))
    return {session.hex() for session in ids}


def are_lost(log: SessionLog, sessions: set[str]) -> bool:
    lost = log.sessions(device="silent", reason=EndReason.LOST, limit=1000)
    return sessions <= {each.session for each in lost}


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.broker
@pytest.mark.slow
def test_leases_throughput_and_memory_outlast_steps_of_the_clock(start_mosquitto: StartBroker, tmp_path: Path) -> None:
    port, clock = start_mosquitto(Broker(fleet=FLEET, edges=(EDGE,))).port, SteppedClock(tmp_path)
    with ExitStack() as stack:
        edge = stack.enter_context(
            scripted_edge(
                BrokerClient(EDGE, "127.0.0.1", port),
                fleet=FLEET,
                folder=tmp_path,
                environment=quota_variables() | clock.environment,
                lease_s=1.0,
                drain_s=0.1,
            )
        )
        silent = stack.enter_context(RawClient(port, None, "silent"))
        log = stack.enter_context(SessionLog(f"sqlite:///{tmp_path / 'log.sqlite3'}"))
        talk = stack.enter_context(talker(port))
        before_mb = None
        for ahead_s in (0, HOUR_S, 0, -HOUR_S, 0, YEAR_S, 0, -YEAR_S, 0):
            clock.set(ahead_s)
            began = time.monotonic()
            opened = open_silent_sessions(silent, "silent")
            talk(REQUESTS)
            talked_s = time.monotonic() - began
            until(partial(are_lost, log, opened))
            took_s, used_mb = time.monotonic() - began, resident_mb(edge.pid)
            before_mb = before_mb or used_mb
            print(
                f"{ahead_s:>10} s ahead: {REQUESTS * LENGTH / talked_s:.0f} tokens/s, silent sessions ended in "
                f"{took_s:.1f} s, {used_mb:.0f} MB"
            )
            assert used_mb < before_mb + 150
