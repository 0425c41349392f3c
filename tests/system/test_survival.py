import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from broker_config.processes import MosquittoProcess
from fleet_common.logs import Event, wait_for_event
from fleet_device.drafters.llama_cpp import LlamaCppDrafter
from fleet_device.requests.generate import GenerateRequest, Generation, RequestContext
from fleet_device.service import DeviceService
from fleet_edge.verifiers.packed.verifier import PackedVerifier
from schemas.policy import Mode, SamplingPolicy
from tests.support.edge_process import edge_process
from tests.support.long_texts import first_long
from tests.support.waiting import until
from tests.support.whole import FLEET, Whole
from tests.system.test_law_of_the_models import prompt_ids

pytestmark = [pytest.mark.broker, pytest.mark.models]

Load = Callable[[str], LlamaCppDrafter]

POLICY = SamplingPolicy(mode=Mode.COUPLED, seed=31)
LENGTH = 80
DISTURB_AT = 15  # tokens


class Writing:
    """A generation on a thread; `disturb` once it runs, then `finish`."""

    def __init__(self, device: DeviceService, ids: Sequence[int]) -> None:
        self._under_way = threading.Event()
        self._written = 0
        self._done: list[Generation] = []
        self._thread = threading.Thread(target=self._write, args=(device, ids))
        self._thread.start()

    def _write(self, device: DeviceService, ids: Sequence[int]) -> None:
        self._done.append(
            device.agent.generate(
                GenerateRequest(ids, policy=POLICY, max_new_tokens=LENGTH), RequestContext(on_tokens=self._count)
            )
        )

    def _count(self, tokens: Sequence[int]) -> None:
        self._written += len(tokens)
        if self._written >= DISTURB_AT:
            self._under_way.set()

    def wait_until_under_way(self) -> None:
        assert self._under_way.wait(120)

    def finish(self) -> Generation:
        self._thread.join(240)
        assert self._done, "the session did not finish"
        return self._done[0]


@pytest.fixture
def own(own_mosquitto: MosquittoProcess, tmp_path: Path, verifier: PackedVerifier) -> Whole:
    return Whole(own_mosquitto.port, tmp_path, verifier)


def undisturbed(whole: Whole, drafter: LlamaCppDrafter) -> tuple[Sequence[int], tuple[int, ...]]:
    with whole.edge(), whole.device(drafter) as device:
        ids, done = first_long(
            lambda ids: device.agent.generate(GenerateRequest(ids, policy=POLICY, max_new_tokens=LENGTH)),
            prompt_ids(drafter),
            tokens=2 * DISTURB_AT,
        )
        return ids, done.tokens


def test_a_broker_restart_costs_nothing_but_time(own: Whole, own_mosquitto: MosquittoProcess, drafters: Load) -> None:
    drafter = drafters("Q4_0")
    ids, wanted = undisturbed(own, drafter)
    with own.edge(), own.device(drafter, verdict_s=2.0) as device:
        writing = Writing(device, ids)
        writing.wait_until_under_way()
        own_mosquitto.restart()
        done = writing.finish()
    assert done.tokens == wanted
    (row,) = own.rows(f"SELECT reason, tokens FROM sessions WHERE session = '{done.session.hex()}'")
    assert row["reason"] == done.reason.value
    assert row["tokens"] == len(wanted)


def edge_of(whole: Whole, target: Path, dtype: str) -> AbstractContextManager["subprocess.Popen[str]"]:
    return edge_process(
        [
            "--fleet", FLEET, "--port", str(whole.port), "--target", str(target), "--engine", "torch",
            "--dtype", dtype,
            "--db", whole.db, "--spool", str(whole.folder / "spool"),
        ]
    )  # fmt: skip


def test_an_edge_that_dies_loses_no_session(own: Whole, drafters: Load, target_folder: Path, dtype: str) -> None:
    drafter = drafters("Q4_0")
    ids, wanted = undisturbed(own, drafter)
    with own.device(drafter, verdict_s=2.0) as device:
        with edge_of(own, target_folder, dtype) as first:
            writing = Writing(device, ids)
            writing.wait_until_under_way()
            first.kill()
            first.wait()
        with edge_of(own, target_folder, dtype) as second:
            done = writing.finish()
            second.send_signal(signal.SIGTERM)
            assert second.wait(30) == 0
    assert done.resumes >= 1
    assert done.tokens == wanted
    session = done.session.hex()
    (row,) = own.rows(f"SELECT reason, tokens FROM sessions WHERE session = '{session}'")
    assert (row["reason"], row["tokens"]) == (done.reason.value, len(wanted))
    assert len(own.rows(f"SELECT * FROM segments WHERE session = '{session}'")) >= 2


def test_a_device_that_is_switched_off_is_lost(own: Whole, drafters: Load) -> None:
    del drafters
    own.options.update(lease_s=20.0, grace_s=0.5)
    command = [
        sys.executable, "-m", "fleet_cli.main", "device", "generate", "--events", "--fleet", FLEET,
        "--device", "gone-1", "--port", str(own.port), "--max-new-tokens", "400", "Tell a very long story.",
    ]  # fmt: skip
    with own.edge():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert wait_for_event(process.stdout, Event.TOKENS) is not None
        process.kill()
        process.communicate()
        until(
            lambda: (
                [row["reason"] for row in own.rows("SELECT reason FROM sessions WHERE device = 'gone-1'")] == ["lost"]
            ),
            patience_s=60,
        )
