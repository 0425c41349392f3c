"""Target model as loaded: weights, identity, limits."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoConfig

from fleet_common.gguf_files import GgufUnreadable, read_header
from fleet_common.host import NVIDIA_DRIVER
from fleet_common.hub import hub_access
from fleet_edge.verifiers.contract import TargetInfo, UnsupportedModel, VerifierError
from fleet_edge.verifiers.safetensors import folder_tensors
from fleet_edge.verifiers.source import (
    check_gguf_reader,
    check_memory,
    check_source,
    is_gguf,
    target_name,
    weights_digest,
    window_limit,
)
from fleet_edge.verifiers.tokens import gguf_tokens, repository_tokens
from fleet_edge.verifiers.torch_engine.attention import context_of
from schemas.vocabulary import Vocabulary, token_strings

_log = logging.getLogger(__name__)

AUTO: Final = "auto"

# Instructions that multiply bfloat16 matrices. Without them it is emulated and slower than float32.
_FAST_BFLOAT16: Final = ("amx_bf16", "avx512_bf16")


def best_device(*, driver: Path = NVIDIA_DRIVER) -> str:
    """Return a CUDA device if torch can use one, else the CPU.

    `driver` exists if the machine has an NVIDIA GPU, even if torch cannot use it.
    """
    if torch.cuda.is_available():
        return "cuda"
    if driver.exists():
        _log.warning(
            "This machine has an NVIDIA GPU that torch cannot use, so the target model runs on the CPU: it "
            "needs torch for CUDA, and a driver that it works with."
        )
    return "cpu"


def describe(device: torch.device, dtype: torch.dtype) -> str:
    number = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device}), {number}"
    return f"{device.type}, {number}, {torch.get_num_threads()} threads"


def resolve_dtype(name: str, *, device: str) -> torch.dtype:
    """Return the torch type; `auto` is bfloat16 where the device is fast at it, else float32."""
    if name != AUTO:
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return torch.bfloat16 if _bfloat16_is_fast(torch.device(device).type) else torch.float32


def _bfloat16_is_fast(kind: str) -> bool:
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in _FAST_BFLOAT16)


def parameters_of(path: Path) -> int | None:
    """Return the number of weights in a folder or a GGUF; None if it is missing or damaged, which loading reports."""
    try:
        if not path.is_dir():
            return read_header(path).parameters
        return sum(each.numbers for each in folder_tensors(path).values())
    except (UnsupportedModel, GgufUnreadable):
        return None


_FLOAT32_BYTES: Final = 4

# Where a model that reads images as well keeps the weights of its language model.
_TEXT_WEIGHTS: Final = {r"^language_model\.": ""}


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A loaded causal language model of transformers, in evaluation mode."""

    model: Any
    info: TargetInfo
    source: str | Path | None = None

    @classmethod
    def of(cls, model: Any, *, name: str, tokens: list[str], source: str | Path | None = None) -> "Target":  # noqa: ANN401
        """Describe a model; `tokens` are the stored strings of all rows of its vocabulary.

        Raises `UnsupportedModel` if the tokenizer is another model's, or the model has no known context.
        """
        info = TargetInfo(
            name=name,
            vocabulary=vocabulary_of(tokens, name=name, rows=int(model.config.vocab_size)),
            context=context_of(model.config),
            end_tokens=end_tokens(getattr(model, "generation_config", None), model.config),
            runs_on=describe(model.device, model.dtype),
        ).identified(b"torch", str(model.dtype).encode(), _weights_id(source or name, model.config))
        return cls(model.eval(), info, source)


def _weights_id(source: str | Path, config: Any) -> bytes:  # noqa: ANN401
    """Return an identity of the weights: a hash of their files, or the revision in a repository."""
    path = Path(source).expanduser()
    if path.exists():
        return weights_digest(path)
    return f"{source}@{getattr(config, '_commit_hash', None)}".encode()


def vocabulary_of(tokens: list[str], *, name: str, rows: int) -> Vocabulary:
    """Return a model's vocabulary; raises `UnsupportedModel` if the tokenizer is another model's."""
    strings = token_strings(tokens)
    if len(strings) > rows:
        raise UnsupportedModel(
            f"The tokenizer of {name} has {len(strings)} tokens and the model {rows}; "
            "they do not belong together: fetch the model again, whole."
        )
    return Vocabulary.of(strings)


def load_target(source: str | Path, *, dtype: str = "auto", device: str = "cpu") -> Target:
    """Load a target model.

    Args:
        source: A folder in the layout of transformers, the path of a GGUF, or a repository id (`owner/name`).
        dtype: `float32`, `bfloat16`, or `auto`: bfloat16 where it is fast, else float32.
        device: As torch names it.

    Raises:
        UnsupportedModel: The files are not those of a model that can be loaded.
        VerifierError: There is no such model, or it does not fit into memory.
    """
    number = resolve_dtype(dtype, device=device)
    path = Path(source).expanduser()
    if torch.device(device).type == "cpu":
        advice = "set dtype to bfloat16, or use a smaller target model, or a quantized GGUF with the engine llama.cpp"
        check_memory(str(source), loading_bytes(path, number), advice)
    with _quiet():
        check_source(source)
        if is_gguf(path):
            model, tokens = _from_gguf(path, number)
            if limit := window_limit(path):
                model.config.max_position_embeddings = min(limit, model.config.max_position_embeddings)
        else:
            with nullcontext() if path.is_dir() else hub_access():
                model, tokens = _load(str(path if path.is_dir() else source), number)
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise VerifierError(f"The target model does not fit on device {device}: {_first_line(error)}") from error
    return Target.of(model, name=target_name(source), tokens=tokens, source=source)


def loading_bytes(path: Path, dtype: torch.dtype) -> int | None:
    """Return the peak bytes of loading; None if unknown."""
    number_bytes = dtype.itemsize
    if not path.is_dir() and dtype is not torch.float32:
        number_bytes += _FLOAT32_BYTES  # of a GGUF all weights are in float32 first
    numbers = parameters_of(path)
    return None if numbers is None else numbers * number_bytes


def end_tokens(*configs: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Return the ids that end a generation: those of the first configuration that names some."""
    for config in configs:
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return tuple(sorted({int(end) for end in (ends if isinstance(ends, list | tuple) else [ends])}))
    return ()


class _FastGguf(gguf.GGUFReader):  # type: ignore[misc]
    """GGUF that is parsed from a plain array: slices of `np.memmap` take seconds for a vocabulary."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, np.asarray(value) if name == "data" else value)


_LARGE_GEMMAS: Final = {"gemma2": 46, "gemma3": 62}
"""Layers of the models of 27B, whose attention has a scale of its own."""


def _attention_scale(path: Path) -> dict[str, float]:
    """Return the scale that a GGUF of Gemma does not have, and for which transformers takes that of other sizes."""
    metadata = read_header(path).metadata
    kind = str(metadata.get("general.architecture"))
    if kind not in _LARGE_GEMMAS:
        return {}
    if metadata[f"{kind}.block_count"] == _LARGE_GEMMAS[kind]:
        return {
            "query_pre_attn_scalar": metadata[f"{kind}.embedding_length"] // metadata[f"{kind}.attention.head_count"]
        }
    return {"query_pre_attn_scalar": metadata[f"{kind}.attention.key_length"]}


def _from_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    check_gguf_reader(path)
    tokens = gguf_tokens(path)
    # transformers reads the file twice, and makes its table of names once for each module of the model.
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = _FastGguf, cache(gguf.get_tensor_name_map)
    try:
        return _weights(str(path.parent), dtype, gguf_file=path.name, **_attention_scale(path)), tokens
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before


def _load(name: str, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """Load the tokens before the weights: they are small, and weights without them are useless."""
    config = text_config(name)
    tokens = repository_tokens(name)
    return _weights(name, dtype, config=config, key_mapping=_TEXT_WEIGHTS), tokens


def text_config(name: str) -> Any:  # noqa: ANN401
    """Return a model's configuration; for an image model, that of its language model.

    Raises `UnsupportedModel` if it is no causal language model, `VerifierError` if it cannot be read.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - 110 MB

    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
    except Exception as error:  # transformers wraps the network's, the hub's and the parser's errors in many ways
        raise VerifierError(
            f"The target model {name} cannot be found, or not be fetched from here; give a folder, "
            f"a GGUF or a repository id that can: {_first_line(error)}"
        ) from error
    known = AutoModelForCausalLM._model_mapping  # noqa: SLF001 - there is no public question
    if type(config) not in known or not isinstance(getattr(config, "vocab_size", None), int):
        raise UnsupportedModel(
            f"The architecture {config.model_type} is no causal language model; choose another target model."
        )
    return config


def _weights(name: str, dtype: torch.dtype, **files: Any) -> Any:  # noqa: ANN401
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - likewise

    try:
        model, report = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True, **files)
    except Exception as error:
        raise UnsupportedModel(
            f"The weights of the target model {name} cannot be loaded; fetch it again: {_first_line(error)}"
        ) from error
    # transformers fills what is missing with random numbers and goes on.
    missing = sorted(report["missing_keys"])
    if missing:
        raise UnsupportedModel(
            f"The weights of the target model {name} lack {len(missing)} tensors, {missing[0]} among them; "
            "fetch it again, whole."
        )
    return model


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep remarks and progress bars off the terminal, and restore transformers' settings afterwards."""
    library = transformers.utils.logging
    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.CRITICAL)
    library.disable_progress_bar()
    try:
        # The bar of a GGUF's conversion obeys none of these settings; it writes to stderr.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()
