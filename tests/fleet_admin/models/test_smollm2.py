import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from fleet_admin.models import smollm2
from fleet_admin.models.facts import ModelsError
from fleet_admin.models.smollm2 import FAMILY, make_missing
from tests.support.prepared_models import prepared
from tests.support.tiny_gguf import tiny_gguf

PROMPT = [5, 9, 14, 9, 77]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tiny_gguf(tmp_path / "shipped.gguf")
    monkeypatch.setattr(smollm2, "_shipped", lambda: path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / FAMILY


def make(folder: Path, *names: str) -> list[str]:
    said: list[str] = []
    make_missing(folder.parent, names, say=said.append)
    return said


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def logits(path: Path) -> NDArray[np.float32]:
    model = llama_cpp.Llama(str(path), n_ctx=32, flash_attn=True, verbose=False, n_threads=1)
    model.eval(PROMPT)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).copy()


@pytest.mark.usefixtures("shipped")
def test_what_is_missing_is_made_once_and_silently(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert len(make(folder, "Q4_1", "target-Q8_0")) == 2
    assert names(folder) == {"Q4_1.gguf", "target-Q8_0.gguf"}
    assert make(folder, "Q4_1", "target-Q8_0") == []
    assert (folder / "target-Q8_0.gguf").stat().st_mode & 0o777 == 0o644
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("shipped")
def test_a_costly_target_has_more_layers_and_the_same_logits(folder: Path) -> None:
    make(folder, "target-Q8_0-cost3")
    plain, deep = (folder / f"target-Q8_0{cost}.gguf" for cost in ("", "-cost3"))
    few, many = (int(gguf.GGUFReader(path).fields["llama.block_count"].contents()) for path in (plain, deep))
    assert many == 3 * few
    # Not bit-identical: llama.cpp computes a model's last layer only for the wanted row, by another kernel.
    np.testing.assert_allclose(logits(deep), logits(plain), atol=1e-4)


def test_a_conversion_that_fails_leaves_no_model(folder: Path, shipped: Path) -> None:
    whole = shipped.read_bytes()
    shipped.write_bytes(b"noise" * 100)
    with pytest.raises(ModelsError):
        make(folder, "Q4_0")
    assert not (folder / "Q4_0.gguf").exists()
    shipped.write_bytes(whole)
    (folder / ".Q4_0.gguf.partial").write_bytes(b"left by a killed process")
    make(folder, "Q4_0")
    assert names(folder) == {"Q4_0.gguf"}


@pytest.mark.models
def test_the_folder_ends_its_turn_with_im_end_and_saves_tied_weights_once() -> None:
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
