import sys
from pathlib import Path

import pytest

from fleet_cli.demo import DemoReport, draft_model, engine_flags, target_model
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
