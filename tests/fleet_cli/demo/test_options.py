import sys
from pathlib import Path

import pytest

from fleet_cli.demo import draft_model, target_model
from tests.support.command import Run, refused


@pytest.fixture
def models(tmp_path: Path) -> Path:
    family = tmp_path / "models" / "smollm2-135m"
    (family / "target").mkdir(parents=True)
    for name in ("Q4_0", "Q5_K"):
        (family / f"{name}.gguf").touch()
    return tmp_path / "models"


def test_a_quantization_is_the_demos_own_model_and_a_file_itself(models: Path) -> None:
    assert draft_model("Q4_0", models) == "smollm2-135m:Q4_0"
    assert draft_model("q5_k", models) == "smollm2-135m:Q5_K"
    assert draft_model("smollm2-135m:Q4_0", models) == "smollm2-135m:Q4_0"
    file = str(models / "smollm2-135m" / "Q4_0.gguf")
    assert draft_model(file, models) == file
    (models / "smollm2-135m" / "target-Q8_0.gguf").touch()
    assert target_model(None, models, engine="torch") == str(models / "smollm2-135m" / "target")
    assert target_model(None, models, engine="llama.cpp") == str(models / "smollm2-135m" / "target-Q8_0.gguf")
    assert target_model("owner/name", models, engine="auto") == "owner/name"


def test_a_model_of_a_repository_is_fetched_before_the_devices_ask_for_it(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        (["--models-dir", "/nope"], "--only target "),
        (["--models-dir", "/nope", "--engine", "llama.cpp"], "--only target-Q8_0 "),
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
