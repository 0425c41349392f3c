"""A request ends with the target model that it began with, whatever other edges serve."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from broker_config.broker import Broker
from fleet_device.drafters.contract import TextCodec
from fleet_device.drafters.llama_cpp import LlamaCppDrafter
from fleet_device.errors import EdgeUnavailable, InvalidRequest
from fleet_device.requests.generate import GenerateRequest, Generation, RequestContext
from fleet_device.service import DeviceService
from fleet_device.session.sequence import CommittedTokens, TokenOrigin
from fleet_device.settings import OfflinePolicy, Outages
from schemas.control import EdgeState
from schemas.policy import SamplingPolicy
from tests.support.brokers import StartBroker
from tests.support.prepared_models import prepared
from tests.support.processes import Program, edge_process
from tests.support.waiting import until
from tests.support.whole import FLEET, Whole
from tests.system.test_law_of_the_models import prompt_ids

pytestmark = [pytest.mark.broker, pytest.mark.models]

TARGETS: Final = ("target-Q8_0.gguf", "Q2_K.gguf")
EDGES: Final = dict(zip(("edge-1", "edge-2"), TARGETS, strict=True))
SECOND: Final = dict(zip(("edge-3", "edge-4"), TARGETS, strict=True))
LENGTH: Final = 80
KILLED_AT: Final = 15  # tokens
GREEDY: Final = SamplingPolicy(temperature=0.0, seed=1, min_tokens=LENGTH)
PATIENCE_S: Final = 300.0
FAIL: Final = Outages(policy=OfflinePolicy.FAIL, after_s=1.0)
OPEN: Final = "SELECT edge FROM segments WHERE reason IS NULL"
SEGMENTS: Final = "SELECT edge, target_id FROM segments WHERE session = '{}' ORDER BY segment"


def other_than(edge: str) -> str:
    return next(each for each in EDGES if each != edge)


@dataclass
class Site:
    """Two edges whose target models have one vocabulary, over one session log, and a device."""

    whole: Whole
    stack: ExitStack
    edges: dict[str, Program] = field(default_factory=dict)
    written: list[int] = field(default_factory=list)
    origins: list[TokenOrigin] = field(default_factory=list)
    killed: str = ""
    then: Callable[[], None] = lambda: None

    def start(self, edge: str, target: str) -> None:
        arguments = [
            "--fleet", FLEET, "--edge", edge, "--port", str(self.whole.port), "--target", str(prepared(target)),
            "--engine", "blocks", "--threads", "1", "--db", self.whole.db, "--spool", str(self.whole.folder / edge),
        ]  # fmt: skip
        self.edges[edge] = self.stack.enter_context(edge_process(arguments))

    def states(self, device: DeviceService) -> dict[str, EdgeState]:
        until(lambda: len(device.edges.online()) == len(self.edges), patience_s=PATIENCE_S)
        return {state.edge: state for state in device.edges.online()}

    @property
    def serving(self) -> list[str]:
        return [row["edge"] for row in self.whole.rows(OPEN) if row["edge"] in self.edges]

    def take(self, tokens: CommittedTokens) -> None:
        self.written += tokens.ids
        self.origins += tokens.origins
        if len(self.written) >= KILLED_AT and not self.killed:
            until(lambda: len(self.serving) == 1, patience_s=PATIENCE_S)
            (self.killed,) = self.serving
            self.edges[self.killed].send_signal(signal.SIGKILL)
            self.edges.pop(self.killed).wait_to_end(timeout_s=PATIENCE_S)
            self.then()

    def generate(self, device: DeviceService, outages: Outages) -> Generation:
        """Generate, and kill the edge that serves it."""
        request = GenerateRequest(prompt_of(device), policy=GREEDY, max_new_tokens=LENGTH, outages=outages)
        return device.agent.generate(request, RequestContext(on_tokens=self.take))

    def targets(self, session: bytes) -> list[tuple[str, str]]:
        return [(row["edge"], row["target_id"]) for row in self.whole.rows(SEGMENTS.format(session.hex()))]


def prompt_of(device: DeviceService) -> tuple[int, ...]:
    return tuple(prompt_ids(device.drafter)[0])


@pytest.fixture
def site(start_mosquitto: StartBroker, tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        site = Site(Whole(start_mosquitto(Broker(edges=(*EDGES, *SECOND))).port, tmp_path), stack)
        for edge, target in EDGES.items():
            site.start(edge, target)
        yield site


Load = Callable[[str], LlamaCppDrafter]


@pytest.mark.exhaustive  # the last test has it wait too
def test_a_request_whose_edge_is_killed_waits_for_the_same_target(site: Site, drafters: Load) -> None:
    with site.whole.device(drafters("Q4_0")) as device:
        before = site.states(device)
        assert before["edge-1"].target_id != before["edge-2"].target_id
        site.then = lambda: site.start(site.killed, EDGES[site.killed])
        done = site.generate(device, Outages(policy=OfflinePolicy.WAIT))
        for edge in site.edges.values():
            edge.end()  # so that its log is complete
    identity = before[site.killed].target_id
    assert (done.unverified, done.target_id and done.target_id.hex()) == (0, identity)
    assert set(site.targets(done.session)) == {(site.killed, identity)}
    assert TokenOrigin.OTHER_TARGET not in site.origins


@pytest.mark.parametrize(
    "renamed",
    [
        pytest.param(False, id="elsewhere", marks=pytest.mark.exhaustive),
        pytest.param(True, id="another file under its name"),
    ],
)
def test_a_request_does_not_go_on_with_another_target(renamed: bool, site: Site, drafters: Load) -> None:
    with site.whole.device(drafters("Q4_0")) as device:
        site.states(device)
        if renamed:
            site.then = lambda: site.start(site.killed, EDGES[other_than(site.killed)])
        with pytest.raises(EdgeUnavailable) as unavailable:
            site.generate(device, FAIL)
    assert unavailable.value.code == "other_target"
    assert KILLED_AT <= len(site.written) < LENGTH


def test_a_request_goes_on_with_another_target_if_the_application_allows_it(site: Site, drafters: Load) -> None:
    with site.whole.device(drafters("Q4_0")) as device:
        before = site.states(device)
        done = site.generate(device, Outages(policy=OfflinePolicy.OTHER_TARGET, after_s=1.0))
        left = other_than(site.killed)
        site.edges[left].end()
    own = len(done.tokens) - done.unverified
    assert 0 < own < len(done.tokens) == len(site.origins)
    assert TokenOrigin.OTHER_TARGET not in site.origins[:own]
    assert set(site.origins[own:]) == {TokenOrigin.OTHER_TARGET}
    assert site.targets(done.session)[-1] == (left, before[left].target_id)
    row = site.whole.rows(f"SELECT target_id, device_unverified FROM sessions WHERE session = '{done.session.hex()}'")
    assert row == [{"target_id": before[site.killed].target_id, "device_unverified": done.unverified}]


def test_a_request_names_its_target_and_keeps_to_it_when_an_edge_of_each_is_killed(site: Site, drafters: Load) -> None:
    for edge, target in SECOND.items():
        site.start(edge, target)
    with site.whole.device(drafters("Q4_0")) as device:
        states = site.states(device)
        names = {state.target for state in states.values()}
        assert len(names) == len(TARGETS)
        prompt = prompt_of(device)

        def write(name: str, context: RequestContext) -> Generation:
            def prepare(_codec: TextCodec) -> GenerateRequest:
                return GenerateRequest(prompt, GREEDY, LENGTH, outages=Outages(policy=OfflinePolicy.WAIT))

            return device.agent.generate(device.encode(prepare, name), context)

        outputs = {}
        for name in names:
            undisturbed = write(name, RequestContext())
            site.written.clear()
            site.killed = ""
            done = write(name, RequestContext(on_tokens=site.take))
            assert states[site.killed].target == states[str(done.edge)].target == name
            assert done.edge != site.killed
            assert done.tokens == undisturbed.tokens
            assert {target for _, target in site.targets(done.session)} == {states[site.killed].target_id}
            outputs[name] = done.tokens
        assert len(set(outputs.values())) == len(TARGETS)
        with pytest.raises(InvalidRequest) as unknown:
            write("another", RequestContext())
        assert unknown.value.code == "model_not_found"
