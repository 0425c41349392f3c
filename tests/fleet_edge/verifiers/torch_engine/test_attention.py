from typing import Any

import pytest

from fleet_edge.verifiers.contract import UnsupportedModel
from fleet_edge.verifiers.torch_engine.attention import context_of, inspect_model
from fleet_edge.verifiers.torch_engine.verifier import TorchVerifier
from tests.fleet_edge.verifiers.oracle import CONFIGS, random_model, target_of, tiny_model

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

UNSERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "mamba2": (
        "Mamba2Config",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    ),
    "jamba": (
        "JambaConfig",
        _SMALL | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    ),
    "bamba": (
        "BambaConfig",
        _SMALL
        | {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 4},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        _SMALL
        | {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        _SMALL | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_d_ssm": 64},
    ),
    "lfm2": ("Lfm2Config", _SMALL | {"layer_types": ["conv", "full_attention"]}),
    "recurrent_gemma": ("RecurrentGemmaConfig", _SMALL | {"lru_width": 32, "block_types": ["recurrent", "attention"]}),
    "bloom": ("BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt_oss": ("GptOssConfig", _SMALL | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "llama4_text": (
        "Llama4TextConfig",
        _SMALL | {"head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 2, "attention_chunk_size": 16},
    ),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_other_architectures_are_refused_by_name(name: str) -> None:
    kind, arguments = UNSERVED[name]
    target = target_of(random_model(kind, arguments))
    with pytest.raises(UnsupportedModel, match=f"{name}") as refusal:
        TorchVerifier(target, budget_bytes=64 << 20)
    assert str(refusal.value).endswith(".")
    assert len(str(refusal.value)) < 300


def test_an_encoder_decoder_is_refused_by_name() -> None:
    import transformers  # noqa: PLC0415 - the only use

    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(UnsupportedModel, match="t5"):
        inspect_model(transformers.T5ForConditionalGeneration(config))


def test_a_window_that_the_layers_do_not_mention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(model.config, "sliding_window", 16, raising=False)
    with pytest.raises(UnsupportedModel):
        inspect_model(model)


def test_learned_positions_limit_the_context() -> None:
    assert context_of(tiny_model("gpt2").config) == 320


def test_a_stretching_rope_is_served_up_to_its_original_context() -> None:
    kind, arguments = CONFIGS["llama"]
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 100}
    model = random_model(kind, arguments | {"rope_parameters": rope})
    assert context_of(model.config) == 100
