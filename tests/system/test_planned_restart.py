"""An edge that is stopped and started again under load goes on with what it had computed."""

import shutil
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from broker_config.broker import Broker
from fleet_common.host import cache_folder
from fleet_device.drafters.llama_cpp import LlamaCppDrafter
from fleet_device.requests.generate import GenerateRequest, Generation, RequestContext
from fleet_edge.verifiers.blocks.kv import PAGE
from schemas.policy import Mode, SamplingPolicy
from tests.support.brokers import StartBroker
from tests.support.prepared_models import prepared
from tests.support.processes import Program, quota_variables
from tests.support.waiting import PATIENCE_S, until
from tests.support.whole import FLEET, Whole
from tests.system.test_law_of_the_models import prompt_ids

pytestmark = [pytest.mark.broker, pytest.mark.models]

LENGTH = 96
POLICY = SamplingPolicy(mode=Mode.COUPLED, seed=11, min_tokens=LENGTH)
DISTURB_AT = 20  # tokens
REQUESTS = 3
KV_BYTES = 256 << 20  # kept on disk, which may have no room for the default
SEGMENTS = "SELECT reason, prefill_tokens FROM segments WHERE session = '{}' ORDER BY segment"


def edge(whole: Whole, kept: str) -> Program:
    """Run an edge whose cache is apart from others; on return it is online."""
    arguments = [
        "edge", "run", "--events", "--fleet", FLEET, "--edge", "edge-1", "--port", str(whole.port),
        "--target", str(prepared("target-Q8_0.gguf")), "--engine", "blocks", "--db", whole.db,
        "--spool", str(whole.folder / "spool"), "--kv-bytes", str(KV_BYTES),
    ]  # fmt: skip
    cache = whole.folder / "cache"
    own = {"CACHE_DIRECTORY": str(cache), "FLEET_EDGE_KV_KEPT": kept, "FLEET_EDGE_DRAIN_S": "0.01"}  # requests go on
    program = Program("fleet_cli.main", arguments, environment={**quota_variables(), **own})
    program.wait_for('"online"', timeout_s=2 * PATIENCE_S)
    return program


def test_a_restart_under_load_computes_less_than_a_page_of_each_request_again(
    start_mosquitto: StartBroker, tmp_path: Path, drafters: Callable[[str], LlamaCppDrafter]
) -> None:
    whole, drafter = Whole(start_mosquitto(Broker()).port, tmp_path), drafters("Q4_0")
    compiled = cache_folder()
    if compiled is not None and (compiled / "blocks").is_dir():
        shutil.copytree(compiled / "blocks", tmp_path / "cache" / "blocks")
    prompts = [(*range(1000 + at, 1000 + at + 3 * PAGE), *prompt_ids(drafter)[at]) for at in range(REQUESTS)]
    written = [0] * REQUESTS

    def write(number: int) -> Generation:
        def count(tokens: Sequence[int]) -> None:
            written[number] += len(tokens)

        request = GenerateRequest(prompts[number], policy=POLICY, max_new_tokens=LENGTH)
        return device.agent.generate(request, RequestContext(on_tokens=count))

    with whole.device(drafter) as device, ThreadPoolExecutor(REQUESTS) as pool:
        with edge(whole, "off"):  # what it computes is not found by the next
            undisturbed = list(pool.map(write, range(REQUESTS)))
        written[:] = [0] * REQUESTS
        with edge(whole, "disk") as first:
            asked = [pool.submit(write, number) for number in range(REQUESTS)]
            until(lambda: all(length >= DISTURB_AT for length in written))
            first.send_signal(signal.SIGTERM)
            first.wait_to_end(timeout_s=PATIENCE_S)
        with edge(whole, "disk"):
            outputs = [each.result() for each in asked]
    assert [each.tokens for each in outputs] == [each.tokens for each in undisturbed]
    segments = [whole.rows(SEGMENTS.format(each.session.hex())) for each in outputs]
    resumed = [its for its in segments if its[0]["reason"] == "handed-over"]
    assert resumed
    for before, *after in resumed:  # a busy machine may have it resume again
        assert before["prefill_tokens"] >= 3 * PAGE
        assert all(each["prefill_tokens"] < PAGE for each in after)
    assert whole.rows("SELECT code FROM events WHERE severity != 'info'") == []
