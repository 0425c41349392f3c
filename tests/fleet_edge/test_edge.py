import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fleet_common.mqtt.errors import ConnectFailed
from fleet_common.mqtt.settings import LinkSettings
from fleet_edge import Edge, EdgeError, EdgeSettings, SessionLog
from fleet_edge.session_log.errors import StoreError
from fleet_edge.session_log.views import MachineState
from fleet_edge.verifiers.contract import Verifier, VerifierError
from schemas.control import ChatFormat, EdgeState, Presence, chat_format_name, decode_json
from schemas.topics import Topic, build
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_fleet import END, FLEET, TARGET
from tests.support.memory_link import MemoryLink
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.tiny_gguf import tiny_gguf
from tests.support.waiting import PATIENCE_S, until


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = MemoryBroker()

    def edge(self, kind: type[Edge] = Edge) -> Edge:
        settings = EdgeSettings.model_validate(
            {"fleet": FLEET, "db": f"sqlite:///{self.folder / 'log.sqlite3'}", "spool": self.folder / "spool"}
        )
        verifier = ScriptedVerifier(TARGET, TARGET.words, context=256, budget_tokens=1 << 20, end_tokens=(END,))
        return kind(settings, verifier=verifier, make_link=self.link)

    def link(self, link: LinkSettings) -> MemoryLink:
        return MemoryLink(self.broker, link.client_id, will=link.will)

    @property
    def state(self) -> EdgeState | None:
        kept = self.broker.retained(build(Topic.EDGE_STATE, fleet=FLEET, edge="edge-1"))
        return None if kept is None else decode_json(EdgeState, kept)

    def logged(self) -> tuple[MachineState, int | None] | None:
        """Return state and progress of the edge in the session log; None as long as it is not there."""
        try:
            with SessionLog(f"sqlite:///{self.folder / 'log.sqlite3'}") as log:
                return next(((edge.state, edge.loading) for edge in log.edges()), None)
        except StoreError:
            return None

    @property
    def presence(self) -> Presence | None:
        return None if self.state is None else self.state.presence


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_in_a_with_block_the_edge_is_online_and_afterwards_it_is_not(place: Place) -> None:
    with place.broker.running(), place.edge() as edge:
        until(lambda: place.presence is Presence.ONLINE)
        assert edge.target.name == "scripted"
    place.broker.pump()
    assert place.presence is Presence.OFFLINE
    assert not [thread for thread in threading.enumerate() if thread.name == "edge"]


@pytest.mark.parametrize("fails", [False, True])
def test_while_it_loads_its_model_it_says_so(place: Place, monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> None:
    verifier = place.edge()._verifier
    seen: list[tuple[Presence, int | None]] = []

    def load(_settings: EdgeSettings, on_progress: Callable[[float], None]) -> Verifier | None:
        for percent in (0, 25, 60):
            on_progress(percent / 100)
            until(lambda: place.state is not None and place.state.loading == percent)  # noqa: B023 - waits here
            assert place.state is not None
            seen.append((place.state.presence, place.state.loading))
        until(lambda: place.logged() == (MachineState.LOADING, 60))
        if fails:
            raise VerifierError("It is damaged.")
        return verifier

    monkeypatch.setattr("fleet_edge.edge.load_verifier", load)
    monkeypatch.setattr("fleet_edge.edge._PROGRESS_S", 0.0)
    monkeypatch.setattr("fleet_edge.edge._LOGGED_S", 0.01)
    monkeypatch.setattr(Edge, "check", lambda _edge: None)
    edge = Edge(place.edge().settings, make_link=place.link)
    edge.stop()
    with place.broker.running():
        if fails:
            with pytest.raises(VerifierError):
                edge.run()
        else:
            edge.run()
    assert seen == [(Presence.OFFLINE, 0), (Presence.OFFLINE, 25), (Presence.OFFLINE, 60)]
    assert place.state is not None
    assert (place.state.presence, place.state.loading) == (Presence.OFFLINE, None)
    assert fails or place.logged() == (MachineState.OFFLINE, None)


def test_the_chat_format_of_its_target_is_published_with_its_state(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    verifier = place.edge()._verifier
    monkeypatch.setattr("fleet_edge.edge.load_verifier", lambda _settings, _on_progress=None: verifier)
    monkeypatch.setattr(Edge, "check", lambda _edge: None)
    for number, source in enumerate([tiny_gguf(tmp_path / "target.gguf"), ""]):
        settings = place.edge().settings.model_copy(update={"target": str(source)})
        edge = Edge(settings, make_link=place.link)
        with place.broker.running(), edge:
            until(lambda: place.presence is Presence.ONLINE)
            kept = place.broker.retained(build(Topic.EDGE_CHAT, fleet=FLEET, edge="edge-1"))
            assert place.state is not None
            assert kept is not None
            if number:
                assert place.state.chat_format is None
            else:
                found = decode_json(ChatFormat, kept)
                assert place.state.chat_format == chat_format_name(kept) == found.name
                assert found.end_tokens == (END,)


def test_on_a_thread_it_runs_until_it_is_stopped_from_another_one(place: Place) -> None:
    edge, told = place.edge(), list[str]()
    thread = threading.Thread(
        target=lambda: edge.run(on_online=lambda: told.append("online"), on_end=lambda: told.append("end"))
    )
    with place.broker.running():
        thread.start()
        until(lambda: place.presence is Presence.ONLINE)
        edge.stop()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert told == ["online", "end"]


def test_whoever_runs_it_hears_of_a_drain_and_of_what_was_handed_over(place: Place) -> None:
    edge, told = place.edge(), list[int]()
    edge.drain()
    with place.broker.running():
        assert edge.run(on_drain=told.append) == 0
    assert told == [0]
    edge = place.edge()
    edge.stop()
    with place.broker.running():
        assert edge.run(on_drain=told.append) == 0
    assert told == [0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_on_the_main_thread_signals_end_it_and_are_given_back(place: Place, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with place.broker.running():
        place.edge().run(on_online=lambda: os.kill(os.getpid(), number))
    assert signal.getsignal(number) is before
    assert place.presence is Presence.OFFLINE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_interrupts_the_handler_of_another_ends_it_too(place: Place, number: signal.Signals) -> None:
    """The handlers take no lock: the event's own may be held by the handler that a second signal interrupts."""
    callers: list[threading.Thread] = []

    class Noted(Edge):
        def drain(self) -> None:
            callers.append(threading.current_thread())
            super().drain()

        def stop(self) -> None:
            callers.append(threading.current_thread())
            super().stop()

    def send() -> None:
        for _ in range(2):
            os.kill(os.getpid(), number)

    with place.broker.running():
        place.edge(Noted).run(on_online=send)
    assert callers
    assert threading.current_thread() not in callers


def test_an_edge_runs_once(place: Place) -> None:
    edge = place.edge()
    with place.broker.running():
        with edge:
            pass
        with pytest.raises(EdgeError):
            edge.run()


def test_what_ends_it_on_its_thread_is_raised_where_it_is_left(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the loop has failed")

    monkeypatch.setattr("fleet_edge.service.EdgeService.run", fail)
    with place.broker.running(), pytest.raises(RuntimeError, match="loop"), place.edge():
        pass
    assert place.presence is Presence.OFFLINE


def test_without_a_broker_it_does_not_begin(place: Place) -> None:
    place.broker.up = False
    with pytest.raises(ConnectFailed), place.edge():
        pass
    with pytest.raises(ConnectFailed):
        place.edge().run()


def test_configuring_an_edge_loads_neither_torch_nor_sqlalchemy() -> None:
    code = (
        "import sys; from fleet_edge import Edge\n"
        "Edge.from_config(); print({'torch', 'sqlalchemy', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
