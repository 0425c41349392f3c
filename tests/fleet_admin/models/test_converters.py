import json
import shutil
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fleet_admin.models.converters import deepen_folder, deepen_gguf
from fleet_admin.models.files import StepFailed
from fleet_admin.models.prepare import SMOLLM2, LocatedSource, deepen_step, prepare, quantize_step, steps_of
from fleet_cli.models import LineReporter
from tests.support.tiny_gguf import tiny_gguf

TIMES = 3
PROMPT = [5, 9, 14, 9, 77]


def gguf_logits(path: Path) -> NDArray[np.float32]:
    model = llama_cpp.Llama(str(path), n_ctx=32, flash_attn=True, verbose=False, n_threads=1)
    model.eval(PROMPT)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).copy()


def layers(path: Path) -> int:
    reader = gguf.GGUFReader(path)
    return int(reader.fields["llama.block_count"].contents())


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_deepened_gguf_has_the_same_logits(tmp_path: Path) -> None:
    source = tiny_gguf(tmp_path / "tiny.gguf")
    deepen_gguf(source, tmp_path / "deep.gguf", TIMES)
    assert layers(tmp_path / "deep.gguf") == TIMES * layers(source)
    # Not bit-identical: llama.cpp computes a model's last layer only for the wanted row, by another kernel.
    np.testing.assert_allclose(gguf_logits(tmp_path / "deep.gguf"), gguf_logits(source), atol=1e-4)


def test_a_deepened_folder_has_the_same_logits(tmp_path: Path, tiny_llama: Path) -> None:
    deepen_folder(tiny_llama, tmp_path / "deep", TIMES)
    plain, deep = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (tiny_llama, tmp_path / "deep")
    )
    assert deep.config.num_hidden_layers == TIMES * plain.config.num_hidden_layers
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        torch.testing.assert_close(deep(ids).logits, plain(ids).logits, rtol=0, atol=0)
    assert (tmp_path / "deep" / "tokenizer.json").read_text() == "{}"


def test_what_is_built_otherwise_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    # An output projection has an unknown name: copies of its layer would change the output.
    odd = tmp_path / "odd"
    shutil.copytree(tiny_llama, odd)
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    weights = {name.replace("layers.1.mlp.down_proj", "layers.1.mlp.out"): w for name, w in model.state_dict().items()}
    del weights["lm_head.weight"]
    save_file(weights, odd / "model.safetensors")
    with pytest.raises(SystemExit, match="deepened"):
        deepen_folder(odd, tmp_path / "deep", TIMES)


def test_prepare_makes_targets_of_a_cost(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    source = LocatedSource(path, "some-package", "1.0", path.stat().st_size)
    plain = quantize_step("Q8_0", source, name="target-Q8_0")
    report = LineReporter(Console(quiet=True), clock=lambda: 0.0)
    folder = tmp_path / "models"
    with pytest.raises(StepFailed):
        prepare(folder, source, [deepen_step(plain, TIMES)], report=report)
    prepare(folder, source, [plain, deepen_step(plain, TIMES)], report=report)
    assert layers(folder / f"target-Q8_0-cost{TIMES}.gguf") == TIMES * layers(folder / "target-Q8_0.gguf")
    found = set(json.loads((folder / "manifest.json").read_text())["artifacts"])
    assert found == {"target-Q8_0", f"target-Q8_0-cost{TIMES}"}


def test_costs_are_made_of_both_targets_last() -> None:
    source = LocatedSource(Path("shipped.gguf"), "some-package", "1.0", 10)
    plain, with_cost = ([(step.name, step.output) for step in steps_of(SMOLLM2, source, cost=cost)] for cost in (1, 8))
    assert plain[-2:] == [("target-Q8_0", "target-Q8_0.gguf"), ("target", "target")]
    costly = [("target-Q8_0-cost8", "target-Q8_0-cost8.gguf"), ("target-cost8", "target-cost8")]
    assert with_cost == [*plain, *costly]
