import io
import queue
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fleet_cli.demo import DemoProgress, DemoReport, _follow, draft_model, engine_flags, run_chat, target_model
from fleet_cli.demo_processes import DemoBroker
from fleet_cli.errors import CommandError
from fleet_common.logs import Event
from tests.support.command import Run, refused


@pytest.fixture
def models(tmp_path: Path) -> Path:
    family = tmp_path / "models" / "smollm2-135m"
    family.mkdir(parents=True)
    for name in ("Q4_0", "Q5_K", "target-Q8_0"):
        (family / f"{name}.gguf").write_bytes(b"GGUF")
    return tmp_path / "models"


def test_a_quantization_is_the_demos_own_model_and_a_file_itself(models: Path) -> None:
    assert draft_model("Q4_0", models) == "smollm2-135m:Q4_0"
    assert draft_model("q5_k", models) == "smollm2-135m:Q5_K"
    assert draft_model("smollm2-135m:Q4_0", models) == "smollm2-135m:Q4_0"
    file = str(models / "smollm2-135m" / "Q4_0.gguf")
    assert draft_model(file, models) == file
    assert target_model(None, models) == str(models / "smollm2-135m" / "target-Q8_0.gguf")
    assert target_model("owner/name", models) == "owner/name"


@pytest.mark.parametrize(
    ("asked", "installed", "chosen"),
    [
        ((None, "auto"), {"torch", "transformers", "numba"}, ("torch", "int8")),
        ((None, "float32"), {"torch", "transformers", "numba", "llama_cpp"}, ("torch", "float32")),
        ((None, "auto"), {"llama_cpp"}, ("llama.cpp", "auto")),
        (("torch", "auto"), {"torch", "transformers", "numba"}, ("torch", "auto")),
        (("auto", "int8"), set(), ("auto", "int8")),
    ],
)
def test_the_engine_is_what_serves_the_demo_s_target_without_measuring(
    asked: tuple[str | None, str],
    installed: set[str],
    chosen: tuple[str, str],
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fleet_edge.verifiers.auto.NVIDIA_DRIVER", models / "none")
    monkeypatch.setattr("fleet_edge.verifiers.auto.find_spec", lambda name: name in installed or None)
    found = engine_flags(*asked, target_model(None, models), measured=False)
    assert (found[1], found[3]) == chosen
    assert engine_flags(None, "auto", "owner/name", measured=True) == ["--engine", "auto", "--dtype", "auto"]


@pytest.mark.parametrize(
    ("drafting", "edge_only", "said"), [(50.0, 40.0, "1.25 times"), (40.0, 50.0, "edge alone"), (None, 50.0, "")]
)
def test_the_report_says_what_drafting_gained(drafting: float | None, edge_only: float, said: str) -> None:
    report = DemoReport("broker", "residual", "draft", "target", 1.0, [], drafting, edge_only)
    assert said in report.lines(80)[-1]
    assert ("tokens/s with drafts" in report.lines(80)[-1]) == bool(said)
    assert report.json()["drafting_tokens_per_s"] == drafting


def test_a_model_is_fetched_before_devices_ask_for_it(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    located: list[str] = []
    monkeypatch.setattr("fleet_cli.demo.locate_model", lambda model, **_: located.append(model))
    assert draft_model("owner/name:*.gguf", models) == "owner/name:*.gguf"
    assert located == ["owner/name:*.gguf"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--draft", "nope"], "--draft nope"),
        (["--draft", "Q9_X"], "--draft Q9_X"),
        (["--draft", "/no/such.gguf"], "--draft /no/such.gguf"),
        (["--draft", "such.gguf"], "--draft such.gguf"),
        (["--draft", "no/such"], "--draft no/such"),
        (["--draft", "Q2_K"], "Q2_K"),
        (["--draft", "other:Q4_0"], "prepared"),
        (["--models-dir", "/nope"], "--only target-Q8_0 "),
        (["--prompts", "/nope"], "--prompts /nope"),
        (["--prompts", sys.executable], "--prompts"),
        (["--broker", "x:y"], "--broker x:y"),
        (["--broker", "nowhere"], "--broker nowhere"),
        (["--json", "/nope/demo.json"], "--json /nope/demo.json"),
        (["--json", "/"], "--json /"),
        (["--top-p", "0"], "top_p"),
        (["--dtype", "float7"], "dtype"),
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


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("broker_lives", "edge_ended", "said"), [(False, None, "mosquitto"), (True, 1, "ended")])
def test_a_broker_or_an_edge_that_has_ended_ends_the_demo(
    broker_lives: bool, edge_ended: int | None, said: str
) -> None:
    process = SimpleNamespace(poll=lambda: edge_ended)
    edge: Any = SimpleNamespace(process=process, end=lambda: None, cause="its own words")
    watch = DemoProgress(Console(quiet=True), 8, show_text=False)
    place = DemoBroker("mosquitto 127.0.0.1:1", "127.0.0.1", 1, lives=lambda: broker_lives)
    with pytest.raises(CommandError, match=said):
        _follow({"device-1": edge}, queue.SimpleQueue(), watch, edge=edge, place=place)


def test_while_the_chat_runs_ctrl_c_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = signal.getsignal(signal.SIGINT), list[Any]()

    def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        seen.append((command[3:], signal.getsignal(signal.SIGINT)))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert run_chat("device-1", ["--fleet", "demo"]) == 3
    arguments = ["device", "chat", "--device", "device-1", "--api-port", "0", "--fleet", "demo"]
    assert seen == [(arguments, signal.SIG_IGN)]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("also", [["--json", "-"], ["--raw"]])
def test_a_chat_makes_no_report_and_continues_no_prompt(also: list[str], fleet: Run) -> None:
    assert "--json" in refused(fleet("demo", "--chat", *also))


LONG = "Write a short story about a lighthouse keeper who finds a message in a bottle that he once sent himself."


@pytest.mark.parametrize("width", [72, 80, 120])
def test_however_narrow_the_terminal_the_figures_are_there_and_the_prompt_gives_way(width: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    watch = DemoProgress(console, 96, show_text=False)
    watch.add("device-1", LONG)
    watch.event("device-1", {"event": Event.START})
    watch.event("device-1", {"event": Event.TOKENS, "number": 48, "text": "Once"})
    console.print(watch._draw())
    heading, row = screen.getvalue().rstrip().splitlines()[-2:]
    assert ("device" in heading, "tokens/s" in heading, "prompt" in heading) == (True, True, True)
    assert ("device-1" in row, " 48 " in row, "generating" in row, "Write" in row) == (True, True, True, True)
    assert max(len(heading), len(row)) <= width
