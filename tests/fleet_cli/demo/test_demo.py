import json
import signal
import subprocess
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from benchmarks.large import suite
from fleet_cli.commands import CommandError
from fleet_cli.demo import (
    _WARM_UP,
    _Fleet,
    compare,
    demo_target,
    draft_model,
    large_target,
    large_target_lines,
    run_chat,
    stay,
    write_device_file,
)
from fleet_cli.demo_processes import StreamedAnswer, stream_answer
from fleet_device import Device
from tests.support.command import Run, refused


@pytest.fixture
def models(tmp_path: Path) -> Path:
    family = tmp_path / "models" / "smollm2-135m"
    family.mkdir(parents=True)
    for name in ("Q4_0", "Q5_K", "target-Q8_0", "target-Q8_0-cost8"):
        (family / f"{name}.gguf").write_bytes(b"GGUF")
    return tmp_path / "models"


def test_a_quantization_is_the_demos_own_model_and_a_file_itself(models: Path) -> None:
    assert draft_model("Q4_0", models) == "smollm2-135m:Q4_0"
    assert draft_model("q5_k", models) == "smollm2-135m:Q5_K"
    assert draft_model("smollm2-135m:Q4_0", models) == "smollm2-135m:Q4_0"
    file = str(models / "smollm2-135m" / "Q4_0.gguf")
    assert draft_model(file, models) == file
    assert demo_target(models) == str(models / "smollm2-135m" / "target-Q8_0.gguf")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--draft", "nope"], "--draft nope"),
        (["--draft", "Q9_X"], "--draft Q9_X"),
        (["--draft", "/no/such.gguf"], "--draft /no/such.gguf"),
        (["--draft", "such.gguf"], "--draft such.gguf"),
        (["--draft", "no/such"], "--draft no/such"),
        (["--draft", "other:Q4_0"], "no model other"),
        (["--models-dir", sys.executable], "another folder"),
        (["--prompts", "/nope"], "--prompts /nope"),
        (["--prompts", sys.executable], "--prompts"),
        (["--broker", "nowhere"], "--broker nowhere"),
        (["--engine", "steam"], "engine"),
        (["--db", "nonsense"], "database URL"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_each_wrong_option_is_told_of_before_anything_is_started(
    arguments: list[str], said: str, models: Path, monkeypatch: pytest.MonkeyPatch, fleet: Run
) -> None:
    started: list[str] = []
    monkeypatch.setattr("fleet_cli.demo_processes.ChildProcess.spawn", lambda name, *_, **__: started.append(name))
    monkeypatch.setattr("fleet_cli.demo_processes.ThrowAwayBroker.__enter__", lambda _: pytest.fail("a broker"))
    assert said in refused(fleet("demo", "--models-dir", models, *arguments))
    assert started == []


def test_while_the_chat_runs_ctrl_c_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = signal.getsignal(signal.SIGINT), list[Any]()

    def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        seen.append((command[3:], signal.getsignal(signal.SIGINT)))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert run_chat("device-1", ["--fleet", "demo"]) == 3
    arguments = ["device", "chat", "--device", "device-1", "--api-listen", "", "--fleet", "demo"]
    assert seen == [(arguments, signal.SIG_IGN)]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("broker_lives", "edge_ended", "said"), [(False, None, "broker"), (True, 1, "its own words")])
def test_a_broker_or_an_edge_that_has_ended_ends_the_demo(
    broker_lives: bool, edge_ended: int | None, said: str
) -> None:
    broker: Any = SimpleNamespace(running=broker_lives, host="127.0.0.1", port=1)
    running = _Fleet(Console(quiet=True), ExitStack(), broker, [], [])
    process = SimpleNamespace(poll=lambda: edge_ended)
    running.edge = SimpleNamespace(  # type: ignore[assignment]
        child=SimpleNamespace(process=process, end=lambda: None, cause="its own words")
    )
    with pytest.raises(CommandError, match=said):
        running.check()


def test_an_interrupt_while_the_last_words_are_printed_is_the_usual_end() -> None:
    said: list[str] = []

    def show(words: str, **_: object) -> None:
        said.append(words)
        if len(said) == 1:
            raise KeyboardInterrupt

    console: Any = SimpleNamespace(print=show)
    broker: Any = SimpleNamespace(running=True)
    stay(_Fleet(console, ExitStack(), broker, [], [], ports={"device-1": 1}), "sqlite://", "nowhere")
    assert len(said) == 2


def test_the_device_file_configures_a_device_and_a_foreign_one_stays(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLEET_DEVICE_MODELS_DIR", raising=False)
    broker: Any = SimpleNamespace(host="127.0.0.1", port=1234)
    path = tmp_path / "device.toml"
    with ExitStack() as stack:
        running = _Fleet(Console(quiet=True), stack, broker, [], [])
        for _ in range(2):  # the file of a demo that was killed is replaced
            write_device_file(path, running, "smollm2-135m:Q4_0", models)
        settings = Device.from_config(path).settings
        assert (settings.fleet, settings.device, settings.model) == ("demo", "app-1", "smollm2-135m:Q4_0")
        assert (settings.models_dir, settings.broker.port) == (models, 1234)
    assert not path.exists()
    path.write_text("fleet = 'mine'\n")
    with ExitStack() as stack:
        write_device_file(path, _Fleet(Console(quiet=True), stack, broker, [], []), "smollm2-135m:Q4_0", models)
    assert path.read_text() == "fleet = 'mine'\n"


class ScriptedFleet:
    """What the demo starts, without processes: `started` has their arguments, `asked` the requests of each device."""

    def __init__(self, patch: pytest.MonkeyPatch, *, settled_after: int) -> None:
        self.started: dict[str, list[list[str]]] = {"edge": [], "device": []}
        self.asked: list[tuple[int, dict[str, Any]]] = []
        self.settled_after = settled_after
        broker = SimpleNamespace(running=True, host="127.0.0.1", port=1)
        patch.setattr("fleet_cli.demo.demo_broker", lambda *_: nullcontext(broker))
        patch.setattr("fleet_cli.demo.edge_process", lambda arguments: self._start("edge", arguments))
        patch.setattr(
            "fleet_cli.demo.device_service", lambda name, arguments: self._start("device", [name, *arguments])
        )
        patch.setattr("fleet_cli.demo.stream_answer", self._answer)

    @contextmanager
    def _start(self, kind: str, arguments: list[str]) -> Iterator[Any]:
        self.started[kind].append(arguments)
        process = SimpleNamespace(kill=lambda: None, poll=lambda: None)
        online = {"target": "toy", "api": f"http://127.0.0.1:{len(self.started['device'])}"}
        yield SimpleNamespace(child=SimpleNamespace(process=process, end=lambda: None), online=online)

    def _answer(self, port: int, _prompt: str, **options: Any) -> Iterator[StreamedAnswer]:
        self.asked.append((port, options))
        chosen = sum(at == port and "edge_only" not in each for at, each in self.asked)
        summary = {
            "session": "s", "seed": 1, "plan": "edge-only", "plan_reason": "So.", "acceptance": None, "uplink_bytes": 1,
            "downlink_bytes": 1, "plan_settled": chosen > self.settled_after,
        }  # fmt: skip
        yield StreamedAnswer("words", 8, 1.0, "length", summary)


def test_the_comparison_has_a_log_of_its_own(models: Path, monkeypatch: pytest.MonkeyPatch, fleet: Run) -> None:
    """Both fleets have edges and devices of the same names, and the second one ends first."""
    scripted = ScriptedFleet(monkeypatch, settled_after=0)
    code, output, complaint = fleet("demo", "--once", "--db", "sqlite:///mine.sqlite3", "--models-dir", models)
    assert code == 0, complaint
    assert output.count("So.") == 2
    assert "Computed, not measured" in output
    logs = {edge[edge.index("--fleet") + 1]: edge[edge.index("--db") + 1] for edge in scripted.started["edge"]}
    assert logs["demo"] == "sqlite:///mine.sqlite3"
    assert logs["demo-large"] != logs["demo"]


@pytest.mark.parametrize(("settled_after", "settled"), [(4, True), (1000, False)])
def test_a_device_is_compared_once_its_choice_is_settled(
    settled_after: int, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = ScriptedFleet(monkeypatch, settled_after=settled_after)
    with ExitStack() as stack:
        running = _Fleet(Console(quiet=True), stack, SimpleNamespace(), [], [])  # type: ignore[arg-type]
        running.add_device("device-1")
        found = compare(running, "a target", "hello", choosing="device-1", drafting="device-2")
    own = [options for port, options in scripted.asked if port == running.ports["device-1"]]
    first = next(number for number, options in enumerate(own) if options.get("edge_only"))
    assert first == (settled_after + 1 if settled else _WARM_UP)
    assert (found.settled, found.plan, found.reason) == (settled, "edge-only", "So.")


def test_what_a_large_target_would_give_is_near_what_was_measured_with_one() -> None:
    """`python -m benchmarks large` measured 9.4 and 16.6 tokens/s with the engine whose step times are recorded."""
    found = large_target()
    assert found.edge_only == pytest.approx(9.4, rel=0.1)
    assert found.drafting == pytest.approx(16.6, rel=0.15)


def test_the_command_that_measures_a_large_target_has_these_options() -> None:
    parser = ArgumentParser()
    suite.add_options(parser)
    command = large_target_lines(large_target())[-1].partition("large ")[2]
    assert parser.parse_args(command.rstrip('"').split()).devices == [1]


Replies = dict[str, tuple[int, str]]


@pytest.fixture
def served() -> Iterator[tuple[int, Replies]]:
    """Serve what a test puts into a mapping, by prompt: status and body."""
    replies: Replies = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, body = replies[asked["messages"][0]["content"]]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, replies
        server.shutdown()


def chunk(text: str, tokens: int, **more: Any) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": more.pop("finish", None)}
    return f"data: {json.dumps({'choices': [choice], 'usage': {'completion_tokens': tokens}, **more})}\n\n"


def test_an_answer_grows_and_ends_with_its_figures(served: tuple[int, Replies]) -> None:
    port, replies = served
    last = chunk("", 3, finish="length", fleet={"plan": "edge-only"})
    replies["hello"] = (200, f"{chunk('One', 1)}: a comment\n\n{chunk(' two', 3)}{last}data: [DONE]\n\n")
    first, second, third = stream_answer(port, "hello")
    assert (first.text, first.tokens, second.text, second.tokens) == ("One", 1, "One two", 3)
    assert (third.text, third.tokens, third.finish, third.summary) == ("One two", 3, "length", {"plan": "edge-only"})


@pytest.mark.parametrize("during", [False, True])
def test_a_request_that_fails_says_why(served: tuple[int, Replies], during: bool) -> None:
    port, replies = served
    body = json.dumps({"error": {"message": "No edge answers."}})
    replies["hello"] = (200, f"{chunk('One', 1)}data: {body}\n\n") if during else (503, body)
    with pytest.raises(CommandError, match="No edge answers"):
        list(stream_answer(port, "hello"))
