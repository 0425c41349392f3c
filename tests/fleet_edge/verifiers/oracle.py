"""Tiny random models, and what they say of one sequence at a time with transformers' own cache."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import TokenType
from transformers import DynamicCache

from fleet_edge.verifiers.contract import TargetInfo
from fleet_edge.verifiers.torch_engine.target import Target
from schemas.vocabulary import Vocabulary
from tests.support.tiny_gguf import tiny_delta_gguf, tiny_gguf, tiny_hybrid_gguf, tiny_mamba_gguf, tiny_nemotron_gguf

VOCABULARY = 61
PADDED = 64  # rows of the models, three of them padding
CONTEXT = 320
WORDS = [f"Ġt{index}" for index in range(VOCABULARY - 2)] + ["<|im_start|>", "<|im_end|>"]

_COMMON: dict[str, Any] = {
    "vocab_size": PADDED,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    # Large enough that attention is far from uniform, so that a wrong mask shows.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_WINDOW = 24

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "llama3-scaled-rope-tied": (
        "LlamaConfig",
        _GROUPED
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2": ("Qwen2Config", _GROUPED),
    "smollm3-layers-without-positions": ("SmolLM3Config", _GROUPED),
    "qwen2-window-in-late-layers": (
        "Qwen2Config",
        _GROUPED | {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 16}),
    "mistral-window": ("MistralConfig", _GROUPED | {"sliding_window": _WINDOW}),
    "gemma2-softcap-window": (
        "Gemma2Config",
        _GROUPED
        | {
            "head_dim": 16,
            "sliding_window": _WINDOW,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
            "query_pre_attn_scalar": 9,
        },
    ),
    "gemma3-window": ("Gemma3TextConfig", _GROUPED | {"head_dim": 16, "sliding_window": _WINDOW}),
    "phi": ("PhiConfig", _COMMON),
    "phi3": ("Phi3Config", _GROUPED),
    "phi4-partial-rotary": ("Phi3Config", _GROUPED | {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": PADDED,
            "n_embd": 48,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": CONTEXT,
            "initializer_range": 0.3,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
}


def tiny_model(name: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """Build a model with random weights, the same for every call."""
    kind, arguments = CONFIGS[name]
    return random_model(kind, arguments, dtype=dtype)


def random_model(kind: str, arguments: dict[str, Any], *, dtype: torch.dtype = torch.float32) -> Any:
    config = getattr(transformers, kind)(**arguments)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.to(dtype).eval()


def tiny_target(name: str, *, dtype: torch.dtype = torch.float32) -> Target:
    return target_of(tiny_model(name, dtype=dtype), name=name)


def tiny_folder(path: Path, name: str = "llama") -> Path:
    tiny_model(name).save_pretrained(path)
    (path / "tokenizer.json").write_text(tokenizer(WORDS), encoding="utf-8")
    return path


_WRITERS: dict[str, Callable[..., Path]] = {
    "llama": tiny_gguf,
    "lfm2": tiny_hybrid_gguf,
    "qwen35": tiny_delta_gguf,
    "granitehybrid": tiny_mamba_gguf,
    "nemotron_h_moe": partial(tiny_nemotron_gguf, experts=6),
    "qwen35 mtp": partial(tiny_delta_gguf, mtp=("shared_head_norm",)),
    "qwen35 mtp of its own": partial(tiny_delta_gguf, mtp=("embed_tokens", "shared_head_head")),
    "qwen35moe mtp": partial(tiny_delta_gguf, mtp=("shared_head_norm",), experts=5),
}


def tiny_target_gguf(path: Path, *, seed: int = 7, kind: str = "llama") -> Path:
    """Write a tiny GGUF with the vocabulary and the context of the tiny models; its weights are others."""
    kinds = [TokenType.NORMAL] * (VOCABULARY - 2) + [TokenType.CONTROL] * 2
    padding = [(f"[PAD{index}]", TokenType.UNUSED) for index in range(VOCABULARY, PADDED)]
    return _WRITERS[kind](path, rows=[*zip(WORDS, kinds, strict=True), *padding], context=CONTEXT, seed=seed)


def tokenizer(words: list[str]) -> str:
    """Return the contents of a tokenizer.json whose last two words are added tokens."""
    plain = {word: index for index, word in enumerate(words[:-2])}
    added = [{"id": len(words) - 2 + index, "content": word} for index, word in enumerate(words[-2:])]
    return json.dumps({"model": {"type": "BPE", "vocab": plain, "merges": []}, "added_tokens": added})


def target_of(model: Any, *, name: str = "tiny") -> Target:
    tokens = [f"t{index}" for index in range(VOCABULARY)]
    info = TargetInfo(name=name, vocabulary=Vocabulary.of(tokens), context=CONTEXT, end_tokens=(2,)).identified(
        name.encode()
    )
    return Target(model, info)


class Oracle:
    """The model's own attention and cache, batch 1: no rollback, a new cache for every question."""

    def __init__(self, name: str) -> None:
        self._model = tiny_model(name)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return `[len(tokens), vocabulary]`: a prefill of all but the last few, then one token at a time."""
        cache = DynamicCache(config=self._model.config)
        head = max(1, len(tokens) - 3)
        pieces = [tokens[:head], *([token] for token in tokens[head:])]
        rows = [self._model(input_ids=torch.tensor([piece]), cache=cache, use_cache=True).logits[0] for piece in pieces]
        return torch.cat(rows)[:, :VOCABULARY]
