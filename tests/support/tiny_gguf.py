"""Small GGUFs: a writer with metadata, and a model of a few kilobytes that llama.cpp loads in a millisecond."""

from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import TokenType

Row = tuple[str | bytes, TokenType]
"""A stored string and its kind."""

END = 2
PADDING = 5
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e")


def _byte_words() -> list[str]:
    """Return the printable stand-ins of the 256 bytes, as byte-level vocabularies write them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    words = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        if byte not in words:
            words[byte] = chr(256 + len([b for b in range(byte) if b not in plain]))
    return [words[byte] for byte in range(256)]


def tiny_words() -> list[str]:
    return [*_CONTROL, *_byte_words(), *(merge.replace(" ", "") for merge in MERGES)]


def tiny_rows() -> list[Row]:
    kinds = [TokenType.CONTROL] * len(_CONTROL) + [TokenType.NORMAL] * (len(tiny_words()) - len(_CONTROL))
    return list(zip(tiny_words(), kinds, strict=True))


def sentencepiece_rows() -> list[Row]:
    """Return the rows of a vocabulary of SentencePiece's kind, with a token for each byte; padding left out."""
    control = [("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]
    return [
        *control,
        *((f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256)),
        *((word, TokenType.NORMAL) for word in ("\u2581", "t", "\u2581t", "h", "e")),
    ]


def _padding(first: int) -> list[Row]:
    return [(f"[PAD{index}]", TokenType.UNUSED) for index in range(first, first + PADDING)]


def new_gguf(
    path: Path,
    architecture: str,
    *,
    layers: int,
    width: int,
    inner: int | list[int],
    heads: int,
    kv_heads: int | list[int],
    dim: int | None = None,
    context: int = 256,
    file_type: int = 0,
    rows: Sequence[Row] | None,
    tokenizer: str = "gpt2",
    merges: Sequence[str] = MERGES,
    bos: int = 1,
    end: int = END,
    template: str | None = CHAT_TEMPLATE,
    split: int = 0,
) -> gguf.GGUFWriter:
    """Return a writer with all metadata, and without a tokenizer if `rows` is None; the caller adds tensors."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_name("tiny")
    writer.add_context_length(context)
    writer.add_block_count(layers)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(file_type)
    if dim is not None:
        writer.add_key_length(dim)
        writer.add_value_length(dim)
    if rows is None:
        writer.add_tokenizer_model("no_vocab")
        return writer
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([word for word, _ in rows])
    writer.add_token_scores([-float(index) for index in range(len(rows))])
    writer.add_token_types([kind for _, kind in rows])
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(value=False)
    if template is not None:
        writer.add_chat_template(template)
    return writer


def write_gguf(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _adding(writer: gguf.GGUFWriter, random: np.random.Generator) -> Callable[..., None]:
    def weight(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype(np.float32))

    return weight


def overwrite(path: Path, key: str, value: bytes | int | None) -> Path:
    """Replace a number in a file's metadata, an int as one of 32 bits; with None, the name of its key."""
    name, content = key.encode(), bytearray(path.read_bytes())
    place = content.index(name) + len(name)
    if value is None:
        content[place - 1] ^= 1
    else:
        new = value if isinstance(value, bytes) else value.to_bytes(4, "little")
        content[place + 4 : place + 4 + len(new)] = new  # behind the type
    path.write_bytes(content)
    return path


def tiny_hybrid_gguf(
    path: Path, *, rows: Sequence[Row] | None = None, context: int = 256, seed: int = 7, end: int = END
) -> Path:
    """Write a model of LFM2's architecture: a layer of short convolutions, one of attention, and again."""
    rows = [*tiny_rows(), *_padding(len(tiny_rows()))] if rows is None else rows
    width, heads, inner, kernel = 64, 2, 96, 3
    kv_heads = [0, 1, 0, 1]
    writer = new_gguf(
        path, "lfm2", layers=len(kv_heads), width=width, inner=inner, heads=heads, kv_heads=kv_heads, rows=rows,
        context=context, end=end,
    )  # fmt: skip
    writer.add_vocab_size(len(rows))
    writer.add_shortconv_l_cache(kernel)
    random = np.random.default_rng(seed)
    weight = _adding(writer, random)

    def norm(name: str, size: int = width) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, dtype=np.float32))

    weight("token_embd", len(rows), width)
    norm("token_embd_norm")
    for layer, count in enumerate(kv_heads):
        at = f"blk.{layer}."
        norm(f"{at}attn_norm")
        norm(f"{at}ffn_norm")
        if count:
            dim = width // heads
            norm(f"{at}attn_q_norm", dim)
            norm(f"{at}attn_k_norm", dim)
            weight(f"{at}attn_q", width, width)
            weight(f"{at}attn_k", dim * count, width)
            weight(f"{at}attn_v", dim * count, width)
            weight(f"{at}attn_output", width, width)
        else:
            weight(f"{at}shortconv.conv", width, kernel)
            weight(f"{at}shortconv.in_proj", 3 * width, width)
            weight(f"{at}shortconv.out_proj", width, width)
        _add_feed(weight, at, width, inner)
    write_gguf(writer)
    return path


def tiny_delta_gguf(
    path: Path,
    *,
    rows: Sequence[Row] | None = None,
    context: int = 256,
    seed: int = 7,
    end: int = END,
    mtp: Sequence[str] | None = None,
    experts: int = 0,
) -> Path:
    """Write a model of Qwen3.5's architecture: a layer of gated delta rule, one of attention, and again.

    With `mtp` a layer that proposes tokens follows, which has these optional tensors. With `experts` each token uses
    two of them, and a shared one.
    """
    rows = [*tiny_rows(), *_padding(len(tiny_rows()))] if rows is None else rows
    width, heads, dim, inner, kernel, layers = 64, 2, 32, 96, 4, 4
    keys, values, size = 1, 2, 32
    writer = new_gguf(
        path, "qwen35moe" if experts else "qwen35", layers=layers + (mtp is not None), width=width, inner=inner,
        heads=heads, kv_heads=1, dim=dim, rows=rows, context=context, end=end,
    )  # fmt: skip
    writer.add_vocab_size(len(rows))
    writer.add_rope_dimension_count(dim // 2)
    writer.add_rope_dimension_sections([4, 2, 2, 0])
    writer.add_full_attention_interval(2)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_state_size(size)
    writer.add_ssm_group_count(keys)
    writer.add_ssm_time_step_rank(values)
    writer.add_ssm_inner_size(values * size)
    writer.add_nextn_predict_layers(int(mtp is not None))
    if experts:
        _add_experts(writer, experts, inner)
    random = np.random.default_rng(seed)
    weight = _adding(writer, random)

    def vector(name: str, count: int = width, middle: float = 1.0) -> None:
        writer.add_tensor(name, random.normal(middle, 0.1, count).astype(np.float32))

    weight("token_embd", len(rows), width)
    vector("output_norm.weight")
    for layer in range(layers + (mtp is not None)):
        at = f"blk.{layer}."
        vector(f"{at}attn_norm.weight")
        vector(f"{at}post_attention_norm.weight")
        if layer % 2 or layer == layers:
            vector(f"{at}attn_q_norm.weight", dim)
            vector(f"{at}attn_k_norm.weight", dim)
            weight(f"{at}attn_q", 2 * heads * dim, width)
            weight(f"{at}attn_k", dim, width)
            weight(f"{at}attn_v", dim, width)
            weight(f"{at}attn_output", width, heads * dim)
        else:
            weight(f"{at}attn_qkv", (2 * keys + values) * size, width)
            weight(f"{at}attn_gate", values * size, width)
            weight(f"{at}ssm_alpha", values, width)
            weight(f"{at}ssm_beta", values, width)
            weight(f"{at}ssm_conv1d", (2 * keys + values) * size, kernel)
            vector(f"{at}ssm_dt.bias", values)
            vector(f"{at}ssm_a", values, -0.3)
            vector(f"{at}ssm_norm.weight", size)
            weight(f"{at}ssm_out", width, values * size)
        _add_feed(weight, at, width, inner, experts)
    if mtp is not None:
        weight(f"blk.{layers}.nextn.eh_proj", width, 2 * width)
        for name in ("enorm", "hnorm", *mtp):
            at = f"blk.{layers}.nextn.{name}"
            vector(f"{at}.weight") if name.endswith("norm") else weight(at, len(rows), width)
    write_gguf(writer)
    return path


def _add_experts(writer: gguf.GGUFWriter, experts: int, inner: int) -> None:
    writer.add_expert_count(experts)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(inner)
    writer.add_expert_shared_feed_forward_length(inner)


def _add_feed(weight: Callable[..., None], at: str, width: int, inner: int, experts: int = 0) -> None:
    if experts:
        weight(f"{at}ffn_gate_inp", experts, width)
        weight(f"{at}ffn_gate_inp_shexp", width)
        weight(f"{at}ffn_gate_exps", experts, inner, width)
        weight(f"{at}ffn_up_exps", experts, inner, width)
        weight(f"{at}ffn_down_exps", experts, width, inner)
    shared = "_shexp" if experts else ""
    weight(f"{at}ffn_gate{shared}", inner, width)
    weight(f"{at}ffn_up{shared}", inner, width)
    weight(f"{at}ffn_down{shared}", width, inner)


def tiny_mamba_gguf(
    path: Path, *, rows: Sequence[Row] | None = None, context: int = 256, seed: int = 7, end: int = END
) -> Path:
    """Write a model of Granite 4-H's architecture: a layer of Mamba-2, one of attention, and again."""
    rows = [*tiny_rows(), *_padding(len(tiny_rows()))] if rows is None else rows
    width, heads, inner = 64, 2, 96
    kv_heads = [0, 1, 0, 1]
    writer = new_gguf(
        path, "granitehybrid", layers=len(kv_heads), width=width, inner=inner, heads=heads, kv_heads=kv_heads,
        rows=rows, context=context, end=end,
    )  # fmt: skip
    writer.add_vocab_size(len(rows))
    writer.add_rope_dimension_count(width // heads)
    writer.add_attention_scale(0.1)
    writer.add_embedding_scale(3.0)
    writer.add_residual_scale(0.5)
    writer.add_logit_scale(2.0)
    mamba = _mamba(writer, width)
    random = np.random.default_rng(seed)
    weight = _adding(writer, random)

    def vector(name: str, *shape: int, middle: float = 1.0) -> None:
        writer.add_tensor(name, random.normal(middle, 0.1, shape).astype(np.float32))

    weight("token_embd", len(rows), width)
    vector("output_norm.weight", width)
    for layer, count in enumerate(kv_heads):
        at = f"blk.{layer}."
        vector(f"{at}attn_norm.weight", width)
        vector(f"{at}ffn_norm.weight", width)
        if count:
            weight(f"{at}attn_q", width, width)
            weight(f"{at}attn_k", width // heads * count, width)
            weight(f"{at}attn_v", width // heads * count, width)
            weight(f"{at}attn_output", width, width)
        else:
            mamba(at, weight, vector)
        _add_feed(weight, at, width, inner)
    write_gguf(writer)
    return path


def _mamba(writer: gguf.GGUFWriter, width: int) -> Callable[..., None]:
    """Write the sizes of layers of Mamba-2; return what adds the tensors of one."""
    groups, states, size, kernel, values = 2, 4, 8, 4, 2 * width
    channels = values + 2 * groups * size
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_state_size(size)
    writer.add_ssm_group_count(groups)
    writer.add_ssm_time_step_rank(states)
    writer.add_ssm_inner_size(values)

    def add(at: str, weight: Callable[..., None], vector: Callable[..., None]) -> None:
        weight(f"{at}ssm_in", values + channels + states, width)
        weight(f"{at}ssm_conv1d", channels, kernel)
        vector(f"{at}ssm_conv1d.bias", channels, middle=0.3)
        vector(f"{at}ssm_dt.bias", states)
        vector(f"{at}ssm_a", states, 1, middle=-0.3)
        vector(f"{at}ssm_d", states, 1)
        vector(f"{at}ssm_norm.weight", groups, values // groups)
        weight(f"{at}ssm_out", width, values)

    return add


def tiny_nemotron_gguf(
    path: Path,
    *,
    rows: Sequence[Row] | None = None,
    context: int = 256,
    seed: int = 7,
    end: int = END,
    experts: int = 0,
) -> Path:
    """Write a model of Nemotron-H's architecture: layers of Mamba-2, a feed-forward part, attention and Mamba-2.

    With `experts`, which are in two groups and narrower than the model, each token uses two of one group and a shared
    one.
    """
    rows = [*tiny_rows(), *_padding(len(tiny_rows()))] if rows is None else rows
    width, heads, dim, inner, latent, layers = 64, 2, 32, 96, 32, "M-*M"
    writer = new_gguf(
        path, "nemotron_h_moe" if experts else "nemotron_h", layers=len(layers), width=width,
        inner=[inner * (layer == "-") for layer in layers], heads=heads, kv_heads=[int(each == "*") for each in layers],
        dim=dim, rows=rows, context=context, end=end,
    )  # fmt: skip
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(len(rows))
    if experts:
        _add_experts(writer, experts, inner)
        writer.add_expert_group_count(2)
        writer.add_expert_group_used_count(1)
        writer.add_expert_weights_norm(value=True)
        writer.add_expert_weights_scale(2.5)
        writer.add_moe_latent_size(latent)
    mamba = _mamba(writer, width)
    random = np.random.default_rng(seed)
    weight = _adding(writer, random)

    def vector(name: str, *shape: int, middle: float = 1.0) -> None:
        writer.add_tensor(name, random.normal(middle, 0.1, shape).astype(np.float32))

    weight("token_embd", len(rows), width)
    weight("output", len(rows), width)
    vector("output_norm.weight", width)
    for number, layer in enumerate(layers):
        at = f"blk.{number}."
        vector(f"{at}attn_norm.weight", width)
        if layer == "M":
            mamba(at, weight, vector)
        elif layer == "*":
            weight(f"{at}attn_q", heads * dim, width)
            weight(f"{at}attn_k", dim, width)
            weight(f"{at}attn_v", dim, width)
            weight(f"{at}attn_output", width, heads * dim)
        else:
            end_of_name = "_shexp" if experts else ""
            weight(f"{at}ffn_up{end_of_name}", inner, width)
            weight(f"{at}ffn_down{end_of_name}", width, inner)
        if layer == "-" and experts:
            weight(f"{at}ffn_gate_inp", experts, width)
            vector(f"{at}exp_probs_b.bias", experts)
            weight(f"{at}ffn_latent_down", latent, width)
            weight(f"{at}ffn_latent_up", width, latent)
            weight(f"{at}ffn_up_exps", experts, inner, latent)
            weight(f"{at}ffn_down_exps", experts, latent, inner)
    write_gguf(writer)
    return path


def tiny_gguf(
    path: Path,
    *,
    vocabulary: bool = True,
    architecture: str = "llama",
    context: int = 256,
    rows: Sequence[Row] | None = None,
    tokenizer: str = "gpt2",
    seed: int = 7,
) -> Path:
    rows = [*tiny_rows(), *_padding(len(tiny_rows()))] if rows is None else rows
    width, heads, kv_heads, inner = 64, 2, 1, 96
    writer = new_gguf(
        path, architecture, layers=1, width=width, inner=inner, heads=heads, kv_heads=kv_heads, context=context,
        rows=rows if vocabulary else None, tokenizer=tokenizer,
    )  # fmt: skip
    writer.add_vocab_size(len(rows))
    random = np.random.default_rng(seed)
    weight = _adding(writer, random)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))

    weight("token_embd", len(rows), width)
    weight("output", len(rows), width)
    norm("output_norm")
    norm("blk.0.attn_norm")
    norm("blk.0.ffn_norm")
    weight("blk.0.attn_q", width, width)
    weight("blk.0.attn_k", width // heads * kv_heads, width)
    weight("blk.0.attn_v", width // heads * kv_heads, width)
    weight("blk.0.attn_output", width, width)
    weight("blk.0.ffn_gate", inner, width)
    weight("blk.0.ffn_up", inner, width)
    weight("blk.0.ffn_down", width, inner)
    write_gguf(writer)
    return path
