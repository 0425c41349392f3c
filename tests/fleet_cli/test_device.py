import json
import shlex
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from fleet_cli import device as device_module
from fleet_cli.commands import CommandError
from fleet_cli.device import _print, at_first, read_grammar
from fleet_cli.main import run
from fleet_cli.options import on_interrupt
from fleet_common.logs import Event
from fleet_device.applications import ApplicationsFile
from fleet_device.requests.prompt import TextOptions
from fleet_device.settings import DeviceSettings
from schemas.errors import FleetError
from schemas.fields import MAX_TOKENS
from schemas.policy import Grammar
from tests.support.command import Run, refused


@pytest.fixture
def device(fleet: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("FLEET_DEVICE_MODELS_DIR", str(tmp_path))
    return partial(fleet, "device")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate hello --model nope:Q4_0", "models_dir"),
        ("run --model nope:Q4_0 --api-listen ''", "models_dir"),
        ("generate hello --model draft.gguf", "GGUF"),
        ("generate hello --config device.toml", "api_prot"),
        ("run --config device.toml", "api_prot"),
        ("doctor --config device.toml", "api_prot"),
        ("generate -", "Standard input is empty; give a prompt."),
        ("generate ''", "The prompt is empty; give a prompt."),
        ("generate hello --stop ''", "--stop is empty"),
        ("generate hello --logit-bias 5", "--logit-bias 5"),
        ("generate hello --logit-bias 5+1e9", "--logit-bias 5+1e9"),
        ("generate hello --logit-bias 5+101", "logit_bias"),
        ("generate hello --min-p 2", "min_p"),
        ("generate hello --min-p nan", "min_p"),
        ("generate hello --repetition-penalty 0", "repetition_penalty"),
        ("chat --presence-penalty 3 --api-listen ''", "presence_penalty"),
        ("chat --min-tokens -1 --api-listen ''", "min_tokens"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    device: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("draft.gguf").write_text("not a model")
    Path("device.toml").write_text("api_prot = 1\n")
    assert said in refused(device(*shlex.split(words), given=b" \n"))


def test_a_chat_beside_a_running_device_uses_all_the_memory(device: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def refuse(settings: DeviceSettings) -> None:
        if settings.api_listen:
            raise FleetError("It runs already.")

    def open_device(settings: DeviceSettings) -> None:
        asked.append((settings.requests_at_once, settings.api_listen))
        raise FleetError("Enough.")

    monkeypatch.setattr("fleet_cli.device_chat.refuse_beside_running", refuse)
    monkeypatch.setattr("fleet_cli.device_chat.Device", open_device)
    assert device("chat", "--api-listen", "127.0.0.1:1")[::2] == (2, "fleet: It runs already.\n")
    assert device("chat", "--api-listen", "")[::2] == (2, "fleet: Enough.\n")
    assert asked == [(1, "")]


def test_sampling_controls_reach_the_request(device: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TextOptions] = []

    def write(_settings: DeviceSettings, _asked: str, options: TextOptions, **_: object) -> None:
        asked.append(options)
        raise FleetError("Enough.")

    monkeypatch.setattr("fleet_cli.device._write", write)
    words = (
        "--min-p 0.1 --presence-penalty -1 --frequency-penalty 0.5 --repetition-penalty 1.1 --logit-bias 7+2.5 "
        "--logit-bias 9-100 --min-tokens 4"
    )
    device("generate", "hello", *words.split())
    device("generate", "hello", "--ignore-eos")
    of_none = {"raw": False, "stop": (), "grammar": None}
    assert asked[0] == {
        **of_none, "min_p": 0.1, "presence_penalty": -1, "frequency_penalty": 0.5, "repetition_penalty": 1.1,
        "logit_bias": {7: 2.5, 9: -100}, "min_tokens": 4,
    }  # fmt: skip
    assert asked[1]["min_tokens"] == MAX_TOKENS


@pytest.mark.slow
def test_a_doctor_that_finds_something_wrong_has_exit_code_1_and_goes_on(device: Run) -> None:
    arguments = ["doctor", "--model", "nope:Q4_0", "--api-listen", "", "--port", "1"]
    code, out, err = device(*arguments)
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert [line.split()[1] for line in lines] == [
        "threads", "certificate", "memory", "model", "api", "broker", "clock", "edge", "vocabulary", "generation"
    ]  # fmt: skip
    assert lines[3].startswith("FAILED  model")
    assert lines[5].startswith("FAILED  broker")
    assert lines[7].startswith("skipped edge")
    code, out, _ = device(*arguments, "--json")
    report = json.loads(out)
    assert (code, report["ok"], report["device"]) == (1, False, "device-1")
    assert report["checks"][3].keys() == {"name", "status", "sentence"}


def test_the_first_interrupt_asks_and_the_second_one_insists() -> None:
    before = signal.getsignal(signal.SIGINT)
    asked: list[bool] = []
    with on_interrupt(at_first(lambda: asked.append(True))):
        signal.raise_signal(signal.SIGINT)
        assert asked == [True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("show", ["_print", "_silent"])
def test_why_a_text_waits_is_said_beside_it(show: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(device_module, show)(Event.WAITING, reason="Edge 'edge-1' has not answered.")
    getattr(device_module, show)(Event.TOKENS, number=1, text="")
    assert capsys.readouterr() == ("", "Waiting: Edge 'edge-1' has not answered.\n")


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a\ufffd[2Jb"), (False, "a\x1b[2Jb")])
def test_a_terminal_gets_no_control_characters_and_a_program_the_text_as_it_is(
    terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    _print(Event.TOKENS, text="a\x1b[2Jb")
    _print(Event.WAITING, reason="The edge says \x1b]0;x\x07.")
    said = capsys.readouterr()
    assert (said.out, said.err) == (shown, "Waiting: The edge says \ufffd]0;x\ufffd.\n")


def test_an_error_cannot_steer_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise FleetError("An edge says \x1b[2Jthis.")

    monkeypatch.setattr("fleet_cli.main.command_line", fail)
    with pytest.raises(SystemExit):
        run()
    assert capsys.readouterr().err == "fleet: An edge says \ufffd[2Jthis.\n"


def test_applications_are_added_listed_and_removed(device: Run, tmp_path: Path) -> None:
    where = ["--applications", str(tmp_path / "applications.json")]
    assert "There are none" in device("app", "list", *where)[1]
    code, key, _ = device("app", "add", "alarms", "--tokens-per-min", "500", *where)
    assert (code, key.count("\n")) == (0, 1)
    assert ApplicationsFile(tmp_path / "applications.json").find(key.strip().encode()) is not None
    assert "alarms already" not in key
    assert "already" in device("app", "add", "alarms", *where)[2]
    listed = device("app", "list", *where)[1]
    assert listed.splitlines()[3].split() == ["alarms", "500", "—", "—"]
    assert "no name for an application" in device("app", "add", "a b", *where)[2]
    assert device("app", "remove", "alarms", *where)[0] == 0
    assert "There is no application" in device("app", "remove", "alarms", *where)[2]


def test_a_grammar_comes_from_a_file_or_a_flag(tmp_path: Path) -> None:
    schema, lark = tmp_path / "schema.json", tmp_path / "text.lark"
    schema.write_text('{"type": "object"}')
    lark.write_text('start: "a"')
    assert read_grammar(json_schema=schema, regex=None, lark=None) == Grammar.json_schema({"type": "object"})
    assert read_grammar(json_schema=None, regex="a+", lark=None) == Grammar.regex("a+")
    assert read_grammar(json_schema=None, regex=None, lark=lark) == Grammar.lark('start: "a"')
    assert read_grammar(json_schema=None, regex=None, lark=None) is None


@pytest.mark.parametrize("content", [b"{", b"\xff", None, b'"' + b"x" * 70_000 + b'"'])
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes | None) -> None:
    schema = tmp_path / "schema.json"
    if content is not None:
        schema.write_bytes(content)
    with pytest.raises(CommandError):
        read_grammar(json_schema=schema, regex=None, lark=None)
