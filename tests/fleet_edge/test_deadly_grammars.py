import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from fleet_common.grammar import compiler
from fleet_common.grammar.compiler import GrammarCompiler
from fleet_device.errors import SessionFailed
from fleet_device.pacing.contract import FixedPacing
from fleet_edge.settings import EdgeSettings
from schemas.messages import Opened, Refused
from schemas.policy import Grammar, GrammarKind, Mode
from schemas.reasons import Action, FaultCode, RefusalCode
from tests.support.grammar_processes import end_at, end_processes, grammar_processes
from tests.support.memory_fleet import Device, MemoryFleet, lossless_text, run, terms
from tests.support.toy_grammar import GRAMMAR, TEXTS

CHAIN = ",".join(f'"{place}":{{"items":{{"$ref":"#/$defs/{place + 1}"}}}}' for place in range(1600))
DEADLY = Grammar(kind=GrammarKind.JSON_SCHEMA, text=f'{{"$defs":{{{CHAIN},"1600":{{}}}},"$ref":"#/$defs/0"}}')


class Scene:
    def __init__(self, folder: Path) -> None:
        self.fleet = MemoryFleet(settings={"spool": folder})
        self.good = Device(self.fleet, "good", terms(1, mode=Mode.COUPLED, max_new_tokens=20), length=2, ahead=True)
        self.good.open()
        self.fleet.settle()
        self.sessions = 10

    def open(self, grammar: Grammar) -> Device:
        self.sessions += 1
        asked = terms(self.sessions, max_new_tokens=6)
        asked = asked.model_copy(update={"policy": asked.policy.model_copy(update={"grammar": grammar})})
        device = Device(self.fleet, "bad", asked, length=0, ahead=False, pacing=FixedPacing(6, edge_only=True))
        device.open()
        while not any(isinstance(each, Opened | Refused) for each in device.messages):
            self.fleet.settle()
        return device

    def refusal(self, grammar: Grammar) -> Refused:
        (reply,) = (each for each in self.open(grammar).messages if isinstance(each, Refused))
        return reply

    def move(self, device: Device) -> None:
        """Move the fleet once; if nothing moves, a grammar is being restored on another thread, or time passes."""
        moved = [self.fleet.broker.step(), self.fleet.step(), device.act()]
        if not any(moved) and all(
            each.constraint is None or each.constraint.ready for each in self.fleet.edge.sessions
        ):
            device.nudge()

    @property
    def compiler(self) -> GrammarCompiler:
        found = self.fleet.edge.handlers.grammars.compiler
        assert found is not None
        return found

    def events(self) -> list[SimpleNamespace]:
        return [event for event in self.fleet.sink.of("event") if event.kind == "grammar"]

    def others_are_untouched(self) -> None:
        run(self.fleet, [self.good], random.Random(0))
        assert self.good.session.committed == lossless_text(self.good.terms)
        assert (self.good.faults, self.good.resumes) == ([], 0)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_deadly_grammar_is_refused_logged_and_remembered(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "bounded_text", lambda grammar: grammar.text)
    assert scene.refusal(DEADLY).code is RefusalCode.GRAMMAR
    (event,) = scene.events()
    assert (event.device, event.code) == ("bad", "killed")
    assert DEADLY.digest in event.sentence
    scene.others_are_untouched()
    scene.fleet.restart_edge()
    assert scene.refusal(DEADLY).code is RefusalCode.GRAMMAR
    assert len(scene.events()) == 1, "no process has seen it again"


def test_two_in_a_row_shut_their_device_out(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "bounded_text", lambda grammar: grammar.text)
    scene.refusal(DEADLY)
    scene.refusal(DEADLY.model_copy(update={"text": DEADLY.text + " "}))
    assert scene.refusal(GRAMMAR).code is RefusalCode.QUARANTINED
    scene.others_are_untouched()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_session_whose_worker_ends_goes_on_in_another(scene: Scene, number: int) -> None:
    device = scene.open(GRAMMAR)
    end_processes(grammar_processes(scene.compiler), number)
    while not device.done:
        scene.move(device)
    assert tuple(token for token in device.session.committed if token) in TEXTS
    assert (device.faults, scene.events()) == ([], [])
    scene.others_are_untouched()


def test_a_session_that_ends_two_processes_is_ended_and_its_device_struck(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = scene.open(GRAMMAR)

    def run_to_end() -> None:
        while not device.done:
            scene.move(device)

    with monkeypatch.context() as patch:
        for token in range(1, 6):
            end_at(patch, (token,))
        with pytest.raises(SessionFailed):
            run_to_end()
    assert [(fault.code, fault.action) for fault in device.faults] == [(FaultCode.INTERNAL, Action.GIVE_UP)]
    (event,) = scene.events()
    assert (event.device, event.session) == ("bad", device.terms.session.hex())
    assert "SIGSEGV" in event.sentence
    again = scene.open(GRAMMAR)
    run(scene.fleet, [again], random.Random(0))
    assert again.faults == [], "the grammar is not banned"
    scene.others_are_untouched()


def test_what_a_grammar_forces_is_guessed_where_the_edge_decodes(scene: Scene) -> None:
    device = scene.open(GRAMMAR)
    run(scene.fleet, [device], random.Random(1))
    assert tuple(token for token in device.session.committed if token) in TEXTS
    (session,) = (each for (name, _, _), each in scene.fleet.known.items() if name == "bad")
    assert session.counters.speculated_accepted == session.counters.speculated
    assert session.counters.grammar_ms > 0.0


def test_an_edge_whose_grammars_are_off_refuses_them(tmp_path: Path) -> None:
    assert EdgeSettings().grammars
    scene = Scene(tmp_path)
    scene.fleet.settings = scene.fleet.settings.model_copy(update={"grammars": False})
    scene.fleet.restart_edge()
    assert scene.refusal(GRAMMAR).code is RefusalCode.GRAMMAR
