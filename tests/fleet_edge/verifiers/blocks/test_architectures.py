"""Each architecture against transformers in float32, on small random models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fleet_edge.verifiers.blocks.architectures import of_config
from fleet_edge.verifiers.blocks.folder_weights import FolderWeights
from fleet_edge.verifiers.blocks.kv import ProcessMemory
from fleet_edge.verifiers.blocks.model import Model
from fleet_edge.verifiers.blocks.verifier import BlocksVerifier
from fleet_edge.verifiers.contract import Item, TargetInfo, UnsupportedModel
from schemas.vocabulary import Vocabulary
from tests.fleet_edge.verifiers.oracle import CONTEXT, VOCABULARY, random_model

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    # Attention is far from uniform, so that a wrong position or window shows.
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ROPE = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": CONTEXT // 4}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_WINDOW = {"sliding_window": 24}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-llama3": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": _ROPE | _LLAMA3}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": _ROPE | {"rope_type": "linear"}}),
    "mistral-window": ("MistralConfig", _WINDOW),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-yarn": ("Qwen2Config", {"rope_parameters": _ROPE | {"rope_type": "yarn"}}),
    "qwen2-window-in-late-layers": (
        "Qwen2Config",
        _WINDOW | {"use_sliding_window": True, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "smollm3": ("SmolLM3Config", {}),
    "phi3": ("Phi3Config", _WINDOW),
    "phi4-partial-rotary": ("Phi3Config", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", _WINDOW | {"head_dim": 32, "num_hidden_layers": 7, "query_pre_attn_scalar": 40}),
    "qwen3moe": (
        "Qwen3MoeConfig",
        {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    ),
    "qwen3moe-normalized": (
        "Qwen3MoeConfig",
        {
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
}


def _model(name: str) -> Any:
    kind, own = CONFIGS[name]
    model = random_model(kind, _COMMON | own)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of one and biases of zero would hide a forgotten one
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def _verifier(folder: Path, *, bits: int = 8) -> BlocksVerifier:
    file = FolderWeights(folder, bits=bits)
    words = Vocabulary.of([f"t{index}" for index in range(VOCABULARY)])
    info = TargetInfo(folder.name, words, file.geometry.context, file.geometry.end_tokens)
    its = file.geometry
    memory = ProcessMemory(layers=its.layers, kv_heads=its.kv_heads, dim=its.head_dim, count=8)
    return BlocksVerifier(Model(file, threads=1), info, memory)


def _rows(verifier: BlocksVerifier, tokens: Sequence[int]) -> NDArray[np.float32]:
    verifier.open(1)
    try:
        pieces = [
            verifier.score([Item(1, tokens[at : at + 41], len(tokens[at : at + 41]))]).copy()
            for at in range(0, len(tokens), 41)
        ]
    finally:
        verifier.close(1)
    return np.concatenate(pieces)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers_up_to_8_bit_rounding(name: str, tmp_path: Path) -> None:
    model = _model(name)
    model.save_pretrained(tmp_path / name)
    tokens = [(7 * index + index * index // 5) % VOCABULARY for index in range(min(200, CONTEXT))]
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([tokens])).logits[0, :, :VOCABULARY].numpy()
    found = _rows(_verifier(tmp_path / name), tokens)
    off = np.sqrt(np.square(found - wanted).mean()) / wanted.std()
    print(name, off)
    # Rounding to 8 bits gives 0.02 to 0.04 in these narrow models, the smallest of 18 planted mistakes 0.056.
    assert off < 0.045


@pytest.mark.parametrize(
    ("name", "key"), [("llama", "intermediate_size"), ("qwen2", "vocab_size"), ("qwen3moe", "moe_intermediate_size")]
)
def test_a_config_that_does_not_fit_the_weights_is_refused(name: str, key: str, tmp_path: Path) -> None:
    _model(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[key] += 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="damaged"):
        _verifier(tmp_path)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2"])
def test_a_hybrid_is_not_sent_to_an_engine_that_refuses_it(kind: str) -> None:
    with pytest.raises(UnsupportedModel) as error:
        of_config({"model_type": kind}, {})
    assert "torch" not in str(error.value)
