"""Facts of a model, read from its files without loading weights: compatibility and memory."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from fleet_common.gguf_files import GgufHeader, GgufUnreadable, read_header, vocabulary_of
from fleet_common.host import write_atomically
from fleet_edge.verifiers.blocks.architectures import of_config
from fleet_edge.verifiers.blocks.kv import state_bytes
from fleet_edge.verifiers.blocks_engine import open_weights
from fleet_edge.verifiers.contract import HYBRIDS, UnsupportedModel, VerifierError
from fleet_edge.verifiers.safetensors import folder_tensors
from schemas.control import ChatFormat
from schemas.errors import FleetError
from schemas.fields import MAX_VOCABULARY
from schemas.vocabulary import Vocabulary, token_strings


class ModelsError(FleetError):
    """Base of the errors of this package."""


class ModelUnreadable(ModelsError):  # noqa: N818 - reads as what it says
    """The file or folder is no readable model."""


class ModelFormat(StrEnum):
    GGUF = "gguf"
    FOLDER = "folder"


@dataclass(frozen=True, slots=True)
class KvShape:
    kv_heads: int
    key_dim: int  # numbers of a key, per head
    value_dim: int  # numbers of a value, per head
    # attention window in tokens. Memory is needed for all tokens even so: a rejection takes tokens back, and those that
    # had left the window would be missing.
    window: int | None = None

    @property
    def numbers(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    source: str  # its file or folder, as given
    form: ModelFormat
    architecture: str
    number_format: str  # of its weights
    vocabulary: Vocabulary
    end_tokens: tuple[int, ...]
    end_texts: tuple[str, ...]  # strings of these tokens
    chat: ChatFormat | None  # its chat template; None without one
    context: int  # tokens that it was trained for; 0 if unknown
    parameters: int
    weight_bytes: int  # as stored
    layers: Sequence[KvShape]
    state_bytes: int  # of a sequence: states of recurrent layers, in the engine blocks
    refusal: str = ""  # why it cannot be used, as the end of a sentence; empty if it can

    def kv_bytes(self, *, tokens: int, number_bytes: int) -> int:
        """Return the KV cache size of a sequence, with states; `number_bytes` is 2 for float16 and bfloat16."""
        return tokens * number_bytes * sum(layer.numbers for layer in self.layers) + self.state_bytes


_SERVED: Final = frozenset({"full_attention", "sliding_attention"})
_GENERATION: Final = "generation_config.json"
_CAUSAL: Final = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
_STRETCHING: Final = frozenset({"dynamic", "longrope"})
"""Rotary embeddings that change beyond the length that the model was first trained for."""

_RUNNING_STATE: Final = frozenset(
    {"linear_conv_kernel_dim", "mamba_d_state", "mamba_d_conv", "ssm_state_size", "state_size", "conv_L_cache"}
)
"""Settings of layers with a running state."""


def folder_facts(folder: Path) -> ModelFacts:
    """Read a folder in transformers' layout; raises `ModelUnreadable` if it does not hold a whole model."""
    from fleet_edge.verifiers.tokens import chat_format, target_tokens  # takes a while to import

    whole = _json(folder / "config.json")
    if not whole:
        raise ModelUnreadable(f"The folder {folder} has no config.json; fetch the model again, whole.")
    # A model that reads images as well keeps the configuration of its language model apart.
    config = whole | found if isinstance(found := whole.get("text_config"), dict) else whole
    config = {new: config[old] for old, new in _NAMES.items() if old in config} | config
    try:
        tokens, chat = target_tokens(folder), chat_format(folder, ())
        weights = folder_tensors(folder).values()
    except (UnsupportedModel, VerifierError) as error:
        raise ModelUnreadable(str(error)) from error
    try:
        context, layers, ends = _context(config), _layers(config), _ends(_json(folder / _GENERATION), config)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelUnreadable(
            f"The config.json of {folder} does not say which layers it has, and for how many positions; fetch the "
            "model again."
        ) from error
    formats = Counter[str]()
    for each in weights:
        formats[each.kind] += each.numbers
    ends = tuple(token for token in ends if 0 <= token < len(tokens))
    return ModelFacts(
        source=str(folder),
        form=ModelFormat.FOLDER,
        architecture=str(config.get("model_type")),
        number_format=max(formats, key=lambda kind: formats[kind]),
        vocabulary=Vocabulary.of(tokens),
        end_tokens=ends,
        end_texts=tuple(tokens[token] for token in ends),
        chat=chat,
        context=context,
        parameters=sum(each.numbers for each in weights),
        weight_bytes=sum(each.nbytes for each in weights),
        layers=layers,
        state_bytes=_state_bytes(folder, str(config.get("model_type"))),
        refusal=_refusal(whole, config),
    )


_NAMES: Final = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
"""Names in old configurations, and today's."""


def _context(config: dict[str, Any]) -> int:
    context = int(config["max_position_embeddings"])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for each in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        original = each.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        if each.get("rope_type", each.get("type")) in _STRETCHING and original:
            context = min(context, int(original))
    return context


def _ends(*configs: dict[str, Any]) -> tuple[int, ...]:
    """Return the ids that end a generation: those of the first configuration that names some."""
    found = next((ends for each in configs if (ends := each.get("eos_token_id")) is not None), ())
    return tuple(sorted({int(end) for end in (found if isinstance(found, list | tuple) else [found])}))


def _refusal(whole: dict[str, Any], config: dict[str, Any]) -> str:
    names = [str(each) for each in whole.get("architectures") or ()]
    if names and not any(name.endswith(_CAUSAL) for name in names):
        return f"({', '.join(names)}) is no causal language model"
    if config.get("is_encoder_decoder"):
        return "has an encoder"
    foreign = sorted({str(kind) for kind in config.get("layer_types") or ()} - _SERVED)
    if config.get("model_type") in HYBRIDS and _is_served_by_blocks(whole):
        return ""
    if foreign:
        kinds = ", ".join(foreign)
        hybrid = "; convert it to a GGUF" if config.get("model_type") in HYBRIDS else ""
        return f"has layers of kind {kinds}, which take no tokens back in a folder{hybrid}"
    if _RUNNING_STATE & config.keys() and not config.get("layer_types"):
        return "has layers with a running state, which take no tokens back"
    return ""


def _is_served_by_blocks(whole: dict[str, Any]) -> bool:
    try:
        of_config(whole, {})
    except (UnsupportedModel, KeyError, TypeError, ValueError):
        return False
    return True


def _state_bytes(path: Path, kind: str) -> int:
    try:
        return state_bytes(open_weights(path, bits=8).geometry.state_shapes) if kind in HYBRIDS else 0
    except UnsupportedModel:
        return 0


def _layers(config: dict[str, Any]) -> tuple[KvShape, ...]:
    heads, count = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    if not 0 < count <= _MAX_LAYERS:
        raise ValueError(count)
    kinds = config.get("layer_types") or ["full_attention"] * count
    window = config.get("sliding_window")
    return tuple(
        KvShape(kv_heads if kind in _SERVED else 0, dim, dim, window if kind == "sliding_attention" else None)
        for kind in kinds[:count]
    )


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON file; empty if it is missing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelUnreadable(f"The file {path} is damaged; fetch the model again.") from error
    if not isinstance(found, dict):
        raise ModelUnreadable(f"The file {path} is damaged; fetch the model again.")
    return found


_MAX_LAYERS: Final = 4096
_EVERY: Final = "attention.sliding_window_pattern"


def gguf_facts(path: Path) -> ModelFacts:
    """Read a GGUF; raises `ModelUnreadable` if it does not hold a whole model."""
    from fleet_edge.verifiers.tokens import chat_format, gguf_tokens  # takes a while to import

    try:
        header = read_header(path)
    except GgufUnreadable as error:
        raise ModelUnreadable(str(error)) from error
    if not header.tensors:
        raise ModelUnreadable(f"The GGUF {path} has no weights; give a file of the whole model.")
    try:
        tokens, chat = gguf_tokens(path), chat_format(path, ())
    except UnsupportedModel as error:
        raise ModelUnreadable(str(error)) from error
    strings = token_strings(tokens)
    if not _MIN_TOKENS <= len(strings) <= MAX_VOCABULARY:
        raise ModelUnreadable(
            f"The GGUF {path} has {len(strings)} tokens, and {_MIN_TOKENS} to {MAX_VOCABULARY} are supported; "
            "convert the model again."
        )

    ends = tuple(token for token in header.end_tokens if token < len(strings))
    return ModelFacts(
        source=str(path),
        form=ModelFormat.GGUF,
        architecture=header.architecture,
        number_format=_number_format(header),
        vocabulary=Vocabulary.of(strings),
        end_tokens=ends,
        end_texts=tuple(strings[token] for token in ends),
        chat=chat,
        context=header.number("context_length"),
        parameters=header.parameters,
        weight_bytes=header.weight_bytes,
        layers=layers_of(header, path),
        state_bytes=_state_bytes(path, header.architecture),
        refusal=_gguf_refusal(header),
    )


_MIN_TOKENS: Final = 2
_RECURRENT: Final = ("mamba", "rwkv", "arwkv")  # beginnings of architectures
_STATES: Final = ("ssm.", "wkv.", "shortconv.")  # and of metadata
_ENCODERS: Final = ("t5", "t5encoder", "bert", "nomic-bert", "modern-bert")
_DIFFUSION: Final = ("dream", "llada", "llada-moe", "rnd1")


def _gguf_refusal(header: GgufHeader) -> str:
    """Return why tokens cannot be taken back, by what the metadata says; empty if they can."""
    kind, prefix = "", f"{header.architecture}."
    states = any(key.removeprefix(prefix).startswith(_STATES) for key in header.metadata)
    if (states and header.architecture not in HYBRIDS) or header.architecture.startswith(_RECURRENT):
        kind = "recurrent"
    elif header.architecture in _ENCODERS:
        kind = "encoder"
    elif header.architecture in _DIFFUSION:
        kind = "diffusion"
    return f"is of the {kind} kind, which takes no tokens back" if kind else ""


def _number_format(header: GgufHeader) -> str:
    """Return the file type as llama.cpp names it; by default the most common tensor type."""
    from gguf.constants import GGMLQuantizationType, LlamaFileType

    stated = header.metadata.get("general.file_type")
    for kind in LlamaFileType:
        if kind == stated:
            return str(kind.name).removeprefix("MOSTLY_").removeprefix("ALL_")
    sizes = Counter[int]()
    for tensor in header.tensors.values():
        sizes[tensor.kind] += tensor.numbers
    names = {int(kind): str(kind.name) for kind in GGMLQuantizationType}
    return names.get(sizes.most_common(1)[0][0], "unknown")


def layers_of(header: GgufHeader, path: Path) -> tuple[KvShape, ...]:
    """Return the keys and values of each layer; raises `ModelUnreadable` if the header does not say."""
    count = header.number("block_count") - header.number("nextn_predict_layers")
    heads = _by_layer(header, "attention.head_count", count)
    width = header.number("embedding_length")
    if not 0 < count <= _MAX_LAYERS or max(heads, default=0) < 1 or width < 1:
        raise ModelUnreadable(f"The GGUF {path} does not say which layers it has; convert the model again.")
    kv_heads = list(_by_layer(header, "attention.head_count_kv", count) or heads)
    every = header.number("full_attention_interval", 1)  # the others have a running state
    kv_heads = [heads if (layer + 1) % max(1, every) == 0 else 0 for layer, heads in enumerate(kv_heads)]
    dim = width // max(heads)
    key, value = (header.number(f"attention.{what}_length", dim) for what in ("key", "value"))
    window = header.number("attention.sliding_window") or None
    slides = _sliding(header, count)
    key_slides = header.number("attention.key_length_swa", key)
    value_slides = header.number("attention.value_length_swa", value)
    layers = [
        KvShape(kv_heads[layer], key_slides, value_slides, window)
        if window and slides[layer]
        else KvShape(kv_heads[layer], key, value)
        for layer in range(count)
    ]
    shared = header.number("attention.shared_kv_layers")  # the last layers look at what others have stored
    return tuple(layers[: count - shared] if 0 < shared < count else layers)


def _by_layer(header: GgufHeader, key: str, count: int) -> Sequence[int]:
    """Return a number per layer, stated once or for each; empty if it is missing."""
    found = header.of(key)
    if isinstance(found, list):
        whole = len(found) >= count and all(isinstance(number, int) for number in found)
        return [int(number) for number in found[:count]] if whole else []
    return [found] * count if isinstance(found, int) and count <= _MAX_LAYERS else []


def _sliding(header: GgufHeader, count: int) -> Sequence[bool]:
    """Return which layers have a sliding window; by default all."""
    pattern = header.of(_EVERY)
    if isinstance(pattern, list) and len(pattern) >= count:
        return [bool(each) for each in pattern[:count]]
    if isinstance(pattern, int) and pattern > 1:
        return [(layer + 1) % pattern != 0 for layer in range(count)]
    return [True] * count


def write_vocabulary(target: Path, out: Path) -> Vocabulary:
    """Write the vocabulary of a target's GGUF to its own file, and return it; raises `ModelsError`."""
    if target.is_dir():
        raise ModelUnreadable(
            f"{target} is a folder; give a GGUF of the same model, in any quantization, for llama.cpp on the devices."
        )
    try:
        strings, content = vocabulary_of(target)
    except GgufUnreadable as error:
        raise ModelUnreadable(str(error)) from error
    if out.exists() and out.samefile(target):
        raise ModelsError(f"{out} is the target itself; name another file with --out.")
    try:
        write_atomically(out, content, mode=0o644)
    except OSError as error:
        raise ModelsError(f"The file {out} cannot be written: {error.strerror or error}.") from error
    return Vocabulary.of(token_strings(strings))
