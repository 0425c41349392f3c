from pathlib import Path

import pytest

from fleet_common.gguf_files import GgufHeader
from fleet_edge.verifiers.source import window_limit
from tests.support.tiny_gguf import new_gguf, tiny_rows, write_gguf

OLD = {"context_length": 32_768, "embedding_length": 4_096, "feed_forward_length": 14_336, "attention.head_count_kv": 8}


def header(architecture: str = "llama", name: str = "zephyr", **values: object) -> GgufHeader:
    fields = {f"{architecture}.{key.replace('__', '.')}": value for key, value in {**OLD, **values}.items()}
    return GgufHeader({"general.architecture": architecture, "general.name": name, **fields}, {})


@pytest.mark.parametrize(
    ("given", "window"),
    [
        ({}, 4_096),
        ({"rope__freq_base": 10_000.0}, 4_096),
        ({"name": "Mistral 7B v0.1", "embedding_length": 64}, 4_096),
        ({"embedding_length": 64}, 0),
        ({"rope__freq_base": 1_000_000.0}, 0),  # v0.2 and later
        ({"context_length": 4_096}, 0),
        ({"rope__scaling__type": "yarn"}, 0),
        ({"expert_count": 8}, 0),
        ({"architecture": "qwen2"}, 0),
        ({"context_length": None}, 0),
    ],
)
def test_the_window_that_the_converter_drops_is_known_by_the_shape(given: dict[str, object], window: int) -> None:
    assert header(**given).lost_window == window  # type: ignore[arg-type]


def test_a_target_without_its_window_has_no_longer_sequences(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mistral-7b.gguf"
    sizes = {"layers": 1, "width": 64, "inner": 96, "heads": 2, "kv_heads": 1}
    writer = new_gguf(path, "llama", context=32_768, rows=tiny_rows(), **sizes)  # type: ignore[arg-type]
    writer.add_string("general.basename", "Mistral")
    write_gguf(writer)
    assert window_limit(path) == 4_096
    assert "safetensors" in caplog.text
    assert window_limit(tmp_path) == 0
