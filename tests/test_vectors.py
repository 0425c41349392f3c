import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from sampling.drawing import Purpose
from schemas import codec, control, messages
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import Action, EndReason, FaultCode, RefusalCode
from schemas.topics import TREE
from scripts import vectors
from tests.support.golden import MESSAGES

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
FORMULAS = (ROOT / "docs" / "formulas.md").read_text(encoding="utf-8")
FILES = sorted(path.name for path in (ROOT / "docs" / "vectors").glob("*.json"))


def test_the_vectors_are_what_the_code_computes_and_those_that_drift_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(vectors.FOLDER, tmp_path / "vectors")
    monkeypatch.setattr(vectors, "FOLDER", tmp_path / "vectors")
    monkeypatch.setattr(sys, "argv", ["vectors", "--check"])
    assert vectors.main() == 0
    for name in FILES:
        path = tmp_path / "vectors" / name
        parts = json.loads(path.read_text(encoding="utf-8"))
        spoil(next(iter(parts.values()))["cases"][0])
        path.write_text(json.dumps(parts), encoding="utf-8")
    assert vectors.main() == 1
    said = capsys.readouterr().err
    assert [name for name in FILES if name not in said] == []


def spoil(case: dict[str, Any]) -> None:
    key, value = list(case.items())[-1]
    match value:
        case bool():
            case[key] = not value
        case int():
            case[key] = value + 1
        case float():
            case[key] = value * (1 + 1e-9)
        case str():
            case[key] = value + " "
        case _:
            case[key] = value[:-1]


def test_every_file_is_named_on_the_pages() -> None:
    assert set(FILES) == set(vectors.FILES)
    for name in FILES:
        assert f"`{name}`" in PAGE + FORMULAS


def section(title: str) -> str:
    found = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found.group(1)


def test_the_page_names_every_topic_and_every_field() -> None:
    for rule in TREE:
        assert re.sub(r"{(\w+)}", r"<\1>", rule.template) in section("Topics")
    for model in MESSAGES:
        way = "up" if model in {messages.Open, messages.Draft, messages.Close} else "down"
        control_message = issubclass(model, control.ControlMessage)
        steering_message = model.__name__.endswith(("Settings", "Request", "Response"))
        title = "Remote settings and commands" if steering_message else "States and telemetry"
        text = section(title if control_message else f"{model.__name__}, {way}")
        named = set(re.findall(r"\w+", text))
        assert set(model.model_fields) <= named, (model.__name__, set(model.model_fields) - named)
    assert set(SamplingPolicy.model_fields) <= set(re.findall(r"\w+", section("Open, up")))
    assert (
        f"[{', '.join(codec.VERDICT_LAYOUT)}]".replace(
            ", base, written, load, chained, logprobs, prompt",
            "(, base, written(, load(, chained(, logprobs(, prompt)))))",
        )
        in PAGE
    )
    assert f"[{', '.join(codec.DRAFT_LAYOUT)}]".replace(", tried, write", "(, tried, write)") in PAGE


def test_the_page_names_every_word_and_every_purpose() -> None:
    for words, title in (
        (RefusalCode, "Refused, down"),
        (FaultCode, "Fault, down"),
        (Action, "Fault, down"),
        (Mode, "Open, up"),
    ):
        missing = {word.value for word in words if f"`{word.value}`" not in section(title)}
        assert missing <= ({"other"} if words is FaultCode else set()), title
    for reason in EndReason:
        assert f"`{reason.value}`" in section("Close, up") + section("Closed, down")
    for purpose in Purpose:
        assert f"| {purpose.name.lower()} | {purpose.value} |" in FORMULAS
