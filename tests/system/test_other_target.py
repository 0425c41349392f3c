"""A request ends with the target model that it began with, whatever other edges serve."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

import pytest

from broker_config.broker import Broker
from fleet_device.drafters.llama_cpp import LlamaCppDrafter
from fleet_device.errors import EdgeUnavailable
from fleet_device.requests.generate import GenerateRequest, RequestContext
from schemas.policy import SamplingPolicy
from tests.support.brokers import StartBroker
from tests.support.prepared_models import prepared
from tests.support.processes import Program, edge_process
from tests.support.waiting import until
from tests.support.whole import FLEET, Whole
from tests.system.test_law_of_the_models import prompt_ids

pytestmark = [pytest.mark.broker, pytest.mark.models]

EDGES: Final = ("edge-1", "edge-2")
TARGETS: Final = ("target-Q8_0.gguf", "Q2_K.gguf")
GREEDY: Final = SamplingPolicy(temperature=0.0, seed=1)
LENGTH: Final = 80
KILLED_AT: Final = 15  # tokens
PATIENCE_S: Final = 120.0
OPEN: Final = "SELECT edge FROM segments WHERE reason IS NULL"


@dataclass
class Site:
    """Two edges whose target models have one vocabulary, over one session log."""

    whole: Whole
    stack: ExitStack
    edges: dict[str, Program] = field(default_factory=dict)

    def start(self, edge: str, target: str) -> None:
        arguments = [
            "--fleet", FLEET, "--edge", edge, "--port", str(self.whole.port), "--target", str(prepared(target)),
            "--engine", "blocks", "--threads", "1", "--db", self.whole.db, "--spool", str(self.whole.folder / edge),
        ]  # fmt: skip
        self.edges[edge] = self.stack.enter_context(edge_process(arguments))

    def kill_serving(self) -> str:
        until(lambda: len(self.whole.rows(OPEN)) == 1, patience_s=PATIENCE_S)
        serving = str(self.whole.rows(OPEN)[0]["edge"])
        self.edges[serving].send_signal(signal.SIGKILL)
        return serving


@pytest.fixture
def site(start_mosquitto: StartBroker, tmp_path: object) -> Iterator[Site]:
    with ExitStack() as stack:
        site = Site(Whole(start_mosquitto(Broker(edges=EDGES)).port, tmp_path), stack)
        for edge, target in zip(EDGES, TARGETS, strict=True):
            site.start(edge, target)
        yield site


def test_a_request_does_not_go_on_with_another_target(site: Site, drafters: Callable[[str], LlamaCppDrafter]) -> None:
    written: list[int] = []
    killed: list[str] = []

    def take(tokens: Sequence[int]) -> None:
        written.extend(tokens)
        if len(written) >= KILLED_AT and not killed:
            killed.append(site.kill_serving())

    drafter = drafters("Q4_0")
    with site.whole.device(drafter, offline_s=5.0) as device:
        until(lambda: len(device.edges.online()) == len(EDGES), patience_s=PATIENCE_S)
        request = GenerateRequest(
            prompt_ids(drafter)[0], policy=GREEDY, max_new_tokens=LENGTH, outages=device.settings.outages()
        )
        with pytest.raises(EdgeUnavailable):
            device.agent.generate(request, RequestContext(on_tokens=take))
