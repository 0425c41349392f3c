"""Small random models of current architectures: a folder by transformers, a GGUF by llama.cpp's converter, and rows.

    python -m benchmarks.engines.random_models NAME FOLDER CONVERTER

The weights are float32, so that an engine that computes the model right comes near to the rows of transformers. Norms
are not one and biases not zero, which would hide mistakes; the logits have a spread of three.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.processes import BenchError

WORDS: Final = 512
LENGTH: Final = 64
"""Tokens of the texts: more than twice the windows below."""

PROMPT: Final = 24
GREEDY: Final = 24
_SPREAD: Final = 3.0
_SEED: Final = 7
_WINDOW: Final = 24
_END: Final = 2
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A class of transformers' configurations, and its values besides those that all have.

    `published` are the fields of published files where transformers writes others, None for those that they do not
    have; `options` are the converter's.
    """

    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()


_HEAD: Final = {"head_dim": 32}
_SWA: Final = {"sliding_window": _WINDOW}
_EXPERTS: Final = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
_DELTA: Final = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "full_attention_interval": 4, "num_hidden_layers": 8,
}  # fmt: skip
_PARTLY_ROTATED: Final = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]
    }
}  # fmt: skip
_GPT_OSS: Final = {
    **_HEAD, **_SWA, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64,
    "layer_types": [_SLIDING, _FULL] * 2,
}  # fmt: skip
_GEMMA4: Final = {
    **_HEAD, **_SWA, "global_head_dim": 64, "num_hidden_layers": 6, "layer_types": [_SLIDING, _SLIDING, _FULL] * 2,
    "vocab_size_per_layer_input": WORDS, "tie_word_embeddings": True, "final_logit_softcapping": 30.0,
}  # fmt: skip
_GEMMA4_DENSE: Final = {
    **_GEMMA4, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    "attention_k_eq_v": True,
}  # fmt: skip
_NEMOTRON: Final = {
    **_HEAD, "num_hidden_layers": 6, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 16,
    "conv_kernel": 4, "time_step_floor": 0.1,
}  # fmt: skip
_NEMOTRON_DENSE: Final = {
    "hybrid_override_pattern": "M-M*-M",
    **dict.fromkeys(("num_experts_per_tok", "n_routed_experts", "n_group", "topk_group", "model_type")),
}  # fmt: skip
"""Without a type the converter does not add transformers' defaults, which make it a mixture of experts."""
_YARN: Final = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 256
}  # fmt: skip
_NO_MTP: Final = ("--no-mtp",)

# fmt: off
ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": Architecture("LlamaConfig"),
    # Its GGUF says no window, so that sequences are to end where that would begin.
    "mistral": Architecture("MistralConfig", {"sliding_window": 4_096, "max_position_embeddings": 8_192}),
    "ministral3": Architecture(
        "Ministral3Config",
        {
            **_HEAD,
            "rope_parameters": {
                **_YARN,
                "rope_theta": 1e6,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "qwen2": Architecture("Qwen2Config"),
    "qwen3": Architecture("Qwen3Config", _HEAD),
    "smollm3": Architecture("SmolLM3Config"),
    "phi3": Architecture("Phi3Config", {"sliding_window": 512}),
    "gemma2": Architecture("Gemma2Config", {**_HEAD, **_SWA, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        {**_HEAD, **_SWA, "num_hidden_layers": 7, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    ),
    "gemma4": Architecture("Gemma4TextConfig", _GEMMA4_DENSE),
    "gemma4-e": Architecture(
        "Gemma4TextConfig",
        {**_GEMMA4, "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 3, "use_double_wide_mlp": True},
    ),
    "gemma4-moe": Architecture(
        "Gemma4TextConfig",
        {
            **_GEMMA4_DENSE,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "qwen2moe": Architecture("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3moe": Architecture("Qwen3MoeConfig", {**_HEAD, **_EXPERTS, "norm_topk_prob": True}),
    "mixtral": Architecture("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "gpt-oss": Architecture(
        "GptOssConfig", {**_GPT_OSS, "rope_parameters": {**_YARN, "rope_theta": 150_000.0, "truncate": False}}
    ),
    "glm4moe": Architecture(
        "Glm4MoeConfig",
        {
            **_HEAD,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "use_qk_norm": True,
        },
    ),
    "qwen35": Architecture("Qwen3_5TextConfig", {**_HEAD, **_DELTA, **_PARTLY_ROTATED}, options=_NO_MTP),
    "qwen35moe": Architecture(
        "Qwen3_5MoeTextConfig",
        {**_HEAD, **_DELTA, **_PARTLY_ROTATED, **_EXPERTS, "shared_expert_intermediate_size": 32},
        options=_NO_MTP,
    ),
    "qwen3next": Architecture(
        "Qwen3NextConfig",
        {
            **_HEAD,
            **_DELTA,
            **_EXPERTS,
            "shared_expert_intermediate_size": 32,
            "norm_topk_prob": True,
            "partial_rotary_factor": 0.25,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        options=_NO_MTP,
    ),
    "lfm2": Architecture(
        "Lfm2Config",
        {
            "layer_types": ["conv", "conv", _FULL, "conv"],
            "conv_L_cache": 3,
            "block_auto_adjust_ff_dim": False,
            "block_ff_dim": 96,
        },
    ),
    "granite-h": Architecture(
        "GraniteMoeHybridConfig",
        {
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            "mamba_n_heads": 4,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
            "mamba_d_head": 32,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "position_embedding_type": None,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
        {"layer_types": ["mamba", "mamba", "attention", "mamba"]},
    ),
    "nemotron-h": Architecture("NemotronHConfig", {**_NEMOTRON, "hybrid_override_pattern": "M-M*-M"}, _NEMOTRON_DENSE),
    "nemotron-h-moe": Architecture(
        "NemotronHConfig",
        {
            **_NEMOTRON,
            "hybrid_override_pattern": "MEM*ME",
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "moe_latent_size": 32,
            "routed_scaling_factor": 2.5,
        },
    ),
    "falcon-h1": Architecture(
        "FalconH1Config",
        {
            **_HEAD,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
        },
    ),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Reference:
    """What transformers computes: logits of two texts, and the greedy continuation of the first one's beginning."""

    texts: NDArray[np.int64]
    rows: NDArray[np.float32]
    greedy: NDArray[np.int64]
    greedy_rows: NDArray[np.float32]

    @classmethod
    def read(cls, path: Path) -> "Reference":
        with np.load(path) as found:
            return cls(found["texts"], found["rows"], found["greedy"], found["greedy_rows"])


def converter_of(path: Path) -> Path:
    """Return the folder of llama.cpp in a source distribution of llama-cpp-python; raise BenchError if it has none."""
    for folder in (path, path / "vendor" / "llama.cpp"):
        if (folder / "convert_hf_to_gguf.py").is_file() and (folder / "gguf-py").is_dir():
            return folder
    raise BenchError(
        f"{path} has no convert_hf_to_gguf.py with gguf-py; name the folder of an unpacked source distribution of "
        "llama-cpp-python, or of llama.cpp."
    )


def make(name: str, folder: Path) -> None:
    """Write a model's folder with its tokenizer, and the rows next to it."""
    import torch  # noqa: PLC0415 - seconds
    import transformers  # noqa: PLC0415 - likewise

    torch.manual_seed(_SEED)
    architecture = ARCHITECTURES[name]
    common = {
        "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.1,
        "bos_token_id": 1, "eos_token_id": _END, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    config = getattr(transformers, architecture.kind)(**{**common, **architecture.values})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    random = torch.Generator().manual_seed(_SEED)
    texts = torch.randint(3, WORDS, (2, LENGTH), generator=random)
    with torch.no_grad():
        buffers = [each for each in model.named_buffers() if "bias" in each[0]]  # by which some routers choose
        for key, values in [*model.named_parameters(), *buffers]:
            if values.dim() == 1 or "bias" in key or key.endswith("sinks"):
                values.add_(0.2 * torch.randn(values.shape, generator=random))
        head = model.get_output_embeddings().weight
        head.mul_(_SPREAD / model(input_ids=texts[:1]).logits.std().item())
        # One text at a time: experts are not to be chosen by what is computed with them.
        rows = np.stack([model(input_ids=text[None], use_cache=False).logits[0].numpy() for text in texts])
        tokens, greedy_rows = texts[0, :PROMPT].tolist(), []
        for _ in range(GREEDY):
            last = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            greedy_rows.append(last.numpy())
            tokens.append(int(last.argmax()))
    model.generation_config = transformers.GenerationConfig(eos_token_id=_END, bos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    np.savez(
        folder / "rows.npz", texts=texts.numpy(), rows=rows, greedy=np.array(tokens[PROMPT:]),
        greedy_rows=np.stack(greedy_rows),
    )  # fmt: skip


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415 - likewise

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<|endoftext|>"]  # the last one transformers adds to tokenizers of Qwen
    words = [*special, *letters]
    merges = [("Ġ", letter) for letter in letters[: WORDS - len(words)]]
    words += map("".join, merges)
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# The converter knows tokenizers by a hash, and reads some from other files: ours is a byte-level BPE in all models. The
# name is none of a family: llama.cpp looks for the special tokens of Phi-3 in a model that is called so.
_CONVERT: Final = """
import sys
root, folder, out, *options = sys.argv[1:]
sys.path[:0] = [root, f"{root}/gguf-py"]
import conversion.base
import convert_hf_to_gguf as program
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
get = program.get_model_class
def with_our_tokenizer(*args, **more):
    found = get(*args, **more)
    for each in found.__mro__:
        if each not in (conversion.base.TextModel, conversion.base.ModelBase) and "set_vocab" in vars(each):
            each.set_vocab = lambda self: self._set_vocab_gpt2()
    return found
program.get_model_class = with_our_tokenizer
sys.argv = ["convert", folder, "--outfile", out, "--outtype", "f32", "--model-name", "random", *options]
program.main()
"""


def convert(name: str, folder: Path, converter: Path) -> None:
    """Write a model's GGUF into its folder; raise BenchError if the converter fails."""
    config, architecture = folder / "config.json", ARCHITECTURES[name]
    saved = config.read_text()
    fields, published = json.loads(saved), architecture.published
    kept = {name: value for name, value in fields.items() if name not in published}
    config.write_text(json.dumps(kept | {name: value for name, value in published.items() if value is not None}))
    words = [sys.executable, "-c", _CONVERT, converter, folder, folder / "model.gguf", *architecture.options]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    config.write_text(saved)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise BenchError(f"The converter of {converter} fails for {name}: {last}")


def main() -> int:
    name, folder, converter = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir(parents=True)
    try:
        make(name, folder)
        convert(name, folder, converter)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
