import json
from contextlib import closing
from pathlib import Path

import pytest

from fleet_cli.commands import CommandError
from fleet_cli.edge import read_warm_prompts
from fleet_common.settings import load_settings
from fleet_device.drafters.model_file import GgufModel
from fleet_device.requests.chat import chat_prompt
from fleet_device.requests.structured import ChatMessage
from fleet_edge.settings import EdgeSettings
from schemas.errors import FleetError
from tests.support.prepared_models import prepared

SYSTEM = "You answer for a plant.\n<|im_start|> is not a token here."
EXAMPLE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
]


def read(path: Path, *lines: object, target: Path) -> list[list[int]]:
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return read_warm_prompts(EdgeSettings.model_validate({"warm_prompts": path, "target": str(target)}))


@pytest.mark.models
@pytest.mark.parametrize("target", ["target-Q8_0.gguf", "target"])
def test_devices_prompts_begin_with_the_tokens_that_an_edge_computes_ahead(target: str, tmp_path: Path) -> None:
    found = read(tmp_path / "warm.jsonl", SYSTEM, EXAMPLE, target=prepared(target))
    with closing(GgufModel(prepared("Q4_0.gguf"), vocabulary_only=True)) as device:
        chats = [[ChatMessage("system", SYSTEM)], [ChatMessage(**each) for each in EXAMPLE]]
        prompts = [chat_prompt(device, [*chat, ChatMessage("user", "And why, in your view?")]).tokens for chat in chats]
        question = len(device.encode("And why, in your view?<|im_end|>\n<|im_start|>assistant\n", special=True))
    for tokens, prompt in zip(found, prompts, strict=True):
        assert prompt[: len(tokens)] == tokens
        assert len(prompt) - len(tokens) <= question, "all but the question"


@pytest.mark.models
@pytest.mark.parametrize("line", [3, [], ["text"], [{"role": "system"}], [{"role": "user", "content": 1}]])
def test_a_line_that_is_no_prompt_is_named(line: object, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="Line 2"):
        read(tmp_path / "warm.jsonl", SYSTEM, line, target=prepared("target-Q8_0.gguf"))


def test_a_file_or_target_that_is_missing_is_named(tmp_path: Path) -> None:
    given = {"warm_prompts": tmp_path / "none.jsonl", "target": str(tmp_path / "none.gguf")}
    with pytest.raises(CommandError, match=r"none\.jsonl"):
        read_warm_prompts(EdgeSettings.model_validate(given))
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(FleetError, match=r"none\.gguf"):
        read_warm_prompts(EdgeSettings.model_validate(given))


@pytest.mark.parametrize("other", [{"prefix_sharing": "off"}, {"engine": "remote"}])
def test_settings_that_contradict_are_refused(other: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="warm_prompts"):
        load_settings(EdgeSettings, config=None, flags={"warm_prompts": str(tmp_path / "warm.jsonl"), **other})
