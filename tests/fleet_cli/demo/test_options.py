from pathlib import Path

import pytest

from fleet_admin.models.files import ModelsError
from fleet_admin.models.prompts import read_prompts
from fleet_cli.demo import check_report_file, draft_model, target_model
from fleet_cli.errors import CommandError
from schemas.errors import FleetError
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


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("draft", ["nope", "Q9_X"])
def test_a_draft_that_does_not_exist_is_named_wherever_one_is(draft: str, prepared: bool, models: Path) -> None:
    with pytest.raises(CommandError, match=f"{draft}"):
        draft_model(draft, models if prepared else models / "none")


@pytest.mark.parametrize("draft", ["/no/such.gguf", "such.gguf", "no/such"])
def test_a_file_that_is_not_there_is_named(draft: str, models: Path) -> None:
    with pytest.raises(CommandError, match=f"{draft}"):
        draft_model(draft, models)


@pytest.mark.parametrize(("engine", "step"), [("torch", "target"), ("llama.cpp", "target-Q8_0")])
def test_a_folder_without_models_is_named_with_the_command_that_makes_them(
    engine: str, step: str, models: Path
) -> None:
    nowhere = models / "none"
    with pytest.raises(CommandError, match=f"{step}"):
        target_model(None, nowhere, engine=engine)


def test_a_draft_that_is_known_but_not_prepared_is_named(models: Path) -> None:
    with pytest.raises(FleetError, match="Q2_K"):
        draft_model("Q2_K", models)
    with pytest.raises(FleetError, match="prepared"):
        draft_model("other:Q4_0", models)


def test_a_report_that_cannot_be_written_is_told_before_anything_is_done(tmp_path: Path) -> None:
    check_report_file(None)
    check_report_file(Path("-"))
    check_report_file(tmp_path / "demo.json")
    with pytest.raises(CommandError, match="--json"):
        check_report_file(tmp_path / "none" / "demo.json")
    with pytest.raises(CommandError, match="--json"):
        check_report_file(tmp_path)


def test_prompts_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelsError, match="--prompts"):
        read_prompts(Path("/no/file"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelsError, match="--prompts"):
        read_prompts(tmp_path / "binary")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--draft", "nope"], "--draft nope"),
        (["--models-dir", "/nope"], "/nope"),
        (["--prompts", "/nope"], "--prompts /nope"),
        (["--broker", "x:y"], "--broker x:y"),
        (["--broker", "nowhere"], "--broker nowhere"),
        (["--json", "/nope/demo.json"], "--json /nope/demo.json"),
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
