"""The table of device scenarios, on real edges over the model's broker."""

from collections.abc import Callable

import pytest

from fleet_device.client.decision import Decision
from fleet_device.pacing.contract import FixedPacing
from schemas.messages import Progress
from schemas.policy import Mode
from schemas.topics import Topic, parse
from tests.protocol_model.edges import ModelEdge
from tests.protocol_model.machine import ProtocolModel
from tests.support.device_scenarios import POLICY, SCENARIOS, Scenario
from tests.support.memory_fleet import terms


class ModelScene:
    def __init__(self, scenario: Scenario, model: ProtocolModel) -> None:
        model.start(two_targets=scenario.other_target)
        self.model = model
        self.device, other = model.devices
        other.crash()
        request = terms(1, mode=Mode.COUPLED, max_new_tokens=40)
        text = self.device.prepare(
            request, pacing=FixedPacing(1), note=model.ledger.sessions, outages=scenario.outages, policy=POLICY
        )
        self.driver, self.session = text.driver, text.session
        self.driver.availability.note_presence(absent=False)
        self.gone: list[ModelEdge] = []

    def decide(self) -> Decision:
        return self.driver._decide()

    def ask(self) -> None:
        self.driver.start()

    def grant(self) -> None:
        self._go_on(lambda: self.session.opened is not None)

    def draft(self) -> None:
        while not self.session.unanswered():
            assert self.driver.step()

    def verdict(self) -> None:
        self._go_on(lambda: not self.session.unanswered())
        assert self.session.committed

    def progress(self) -> None:
        assert self.session.opened is not None
        self.driver.inbox.put(Progress(handle=self.session.opened.handle, computed=5, tokens=10, ahead=0))
        self._handle()

    def other_gone(self) -> None:
        self._end(next(edge for edge in self.model.edges if edge.name != self._edge))

    def edge_gone(self) -> None:
        self._end(next(edge for edge in self.model.edges if edge.name == self._edge))

    def edge_back(self) -> None:
        self.gone.pop().start()
        self._settle()

    def broker_gone(self) -> None:
        self.model.broker.kill(self.device.name)
        self._settle()

    def broker_back(self) -> None:
        self.model.broker.revive(self.device.name)
        self._settle()

    def pass_time(self, seconds: float) -> None:
        self.model.clock.seconds += seconds

    @property
    def _edge(self) -> str:
        assert self.session.opened is not None
        return self.session.opened.edge

    def _end(self, edge: ModelEdge) -> None:
        edge.crash()
        self.gone.append(edge)
        self._settle()

    def _go_on(self, done: Callable[[], bool]) -> None:
        while not done():
            for edge in self.model.edges:
                edge.work()
            if self.model.broker.waiting:
                self.model.broker.arrive(0)
            self._handle()

    def _settle(self) -> None:
        """Deliver the states of edges to the device, and nothing else."""
        broker = self.model.broker
        broker.pump()
        self._handle()
        while states := [
            place
            for place, parcel in enumerate(broker.waiting)
            if parcel.receiver == self.device.name and parse(parcel.topic).topic is Topic.EDGE_STATE
        ]:
            broker.arrive(states[0])
            self._handle()

    def _handle(self) -> None:
        while (event := self.driver.inbox.get()) is not None:
            self.driver._handle(event)
            self.model.broker.pump()


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_device_decides_the_same_before_real_edges(name: str) -> None:
    scenario, model = SCENARIOS[name], ProtocolModel()
    try:
        decided = scenario.play(ModelScene(scenario, model))
    finally:
        model.close()
    scenario.check(decided)


def test_an_edge_that_is_back_is_asked_at_once() -> None:
    scenario, model = SCENARIOS["an edge that goes, and is back"], ProtocolModel()
    try:
        scene = ModelScene(scenario, model)
        for step in (scene.ask, scene.grant, scene.draft, scene.other_gone, scene.edge_gone):
            step()
        asked = scene.session._attempt
        scene.edge_back()
        assert scene.session._attempt == asked + 1
    finally:
        model.close()
