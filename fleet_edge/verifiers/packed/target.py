"""Target model as loaded: weights, identity, limits."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from fleet_edge.verifiers.contract import TargetInfo, UnsupportedModel, VerifierError
from fleet_edge.verifiers.packed.architecture import context_of
from fleet_edge.verifiers.packed.precision import describe, resolve_device, resolve_dtype
from fleet_edge.verifiers.packed.tokens import gguf_tokens, repository_tokens
from fleet_edge.verifiers.packed.weights import check_memory, folder_numbers, gguf_numbers
from fleet_edge.verifiers.source import check_folder, check_gguf, check_repository, is_gguf
from fleet_runtime.available_memory import available_memory
from fleet_runtime.hub import hub_access
from schemas.vocabulary import Vocabulary, token_strings

__all__ = ["Target", "end_tokens", "load_target", "target_tokens", "text_config"]

_FLOAT32_BYTES: Final = 4

# Where a model that reads images as well keeps the weights of its language model.
_TEXT_WEIGHTS: Final = {r"^language_model\.": ""}


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A loaded target model.

    Attributes:
        model: A transformers causal language model in evaluation mode.
        info: What the rest of the edge must know of it.
        source: Where it was loaded from, as `load_target` takes it; None if that is not known.
    """

    model: Any
    info: TargetInfo
    source: str | Path | None = None

    @classmethod
    def of(cls, model: Any, *, name: str, tokens: list[str], source: str | Path | None = None) -> "Target":  # noqa: ANN401
        """Describe a model.

        Args:
            model: A transformers causal language model.
            name: For the log.
            tokens: What is stored for every row of its vocabulary.
            source: Where it was loaded from.

        Raises:
            UnsupportedModel: The tokenizer is another model's, or the model has no known context.
        """
        strings = token_strings(tokens)
        rows = int(model.config.vocab_size)
        if len(strings) > rows:
            raise UnsupportedModel(
                f"The tokenizer of {name} has {len(strings)} tokens and the model {rows}; "
                "they do not belong together: fetch the model again, whole."
            )
        info = TargetInfo(
            name=name,
            vocabulary=Vocabulary.of(strings),
            context=context_of(model.config),
            end_tokens=end_tokens(getattr(model, "generation_config", None), model.config),
            runs_on=describe(model.device, model.dtype),
        )
        return cls(model.eval(), info, source)


def load_target(source: str | Path, *, dtype: str = "auto", device: str = "cpu") -> Target:
    """Load a target model.

    Args:
        source: A folder in the layout of transformers, the path of a GGUF, or a repository id (`owner/name`).
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 where it is fast, else float32.
        device: As torch names it, or `auto`: a GPU if there is one that torch can use, else the CPU.

    Raises:
        UnsupportedModel: The files are not those of a model that can be loaded.
        VerifierError: There is no such model, dtype or device.
    """
    device = resolve_device(device)
    number = resolve_dtype(dtype, device=device)
    path = Path(source).expanduser()
    if torch.device(device).type == "cpu":
        check_memory(
            name=str(source),
            needed=_loading_bytes(path, number),
            available=available_memory(),
            number=str(number).removeprefix("torch."),
        )
    with _quiet():
        if path.is_dir():
            model, tokens = _from_folder(path, number)
        elif is_gguf(path):
            model, tokens = _from_gguf(path, number)
        else:
            model, tokens = _from_repository(str(source), number)
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise VerifierError(f"The target model does not fit on device {device}: {_first_line(error)}") from error
    name = _name(path) if path.exists() else str(source)
    return Target.of(model, name=name, tokens=tokens, source=source)


def target_tokens(source: str | Path) -> list[str]:
    """Read the token strings of a target model by id, padding left out, without loading its weights.

    Args:
        source: As `load_target` takes it.

    Raises:
        UnsupportedModel: The files are not those of a model that can be loaded.
        VerifierError: There is no such model.
    """
    path = Path(source).expanduser()
    with _quiet():
        if path.is_dir():
            check_folder(path)
            tokens = repository_tokens(str(path))
        elif is_gguf(path):
            check_gguf(path)
            tokens = gguf_tokens(path)
        else:
            check_repository(str(source))
            with hub_access():
                text_config(str(source))
                tokens = repository_tokens(str(source))
    return token_strings(tokens)


def _loading_bytes(path: Path, dtype: torch.dtype) -> int | None:
    """Return what loading takes at its peak; None where it is not known before."""
    if path.is_dir():
        numbers = folder_numbers(path)
        return None if numbers is None else numbers * dtype.itemsize
    numbers = gguf_numbers(path) if path.is_file() else None
    # Of a GGUF all weights are in float32 first.
    both = _FLOAT32_BYTES + (0 if dtype is torch.float32 else dtype.itemsize)
    return None if numbers is None else numbers * both


def end_tokens(*configs: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Return the ids that end a text: those of the first configuration that names some.

    Args:
        configs: The generation configuration, or None; then the model's.
    """
    for config in configs:
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return tuple(sorted({int(end) for end in (ends if isinstance(ends, list | tuple) else [ends])}))
    return ()


def _from_folder(path: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    check_folder(path)
    return _load(str(path), dtype)


def _from_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    check_gguf(path)
    tokens = gguf_tokens(path)
    return _weights(str(path.parent), dtype, gguf_file=path.name), tokens


def _from_repository(name: str, dtype: torch.dtype) -> tuple[Any, list[str]]:
    check_repository(name)
    with hub_access():
        return _load(name, dtype)


def _load(name: str, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """Load the tokens first: they are small, and weights without them are of no use."""
    config = text_config(name)
    tokens = repository_tokens(name)
    return _weights(name, dtype, config=config, key_mapping=_TEXT_WEIGHTS), tokens


def text_config(name: str) -> Any:  # noqa: ANN401
    """Return a model's configuration; of one that reads images as well, that of its language model.

    Args:
        name: A folder or a repository id.

    Raises:
        UnsupportedModel: It is no causal language model.
        VerifierError: There is none, or it cannot be read.
    """
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


def _name(path: Path) -> str:
    """Return what the log calls a local model: its file or folder; of `<family>/target`, the family."""
    path = path.resolve()
    return path.parent.name if path.name == "target" else path.name


def _first_line(error: BaseException) -> str:
    """Return the first sentence of an error that may go on for pages."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep remarks and progress bars off the terminal, and leave transformers' settings as they were."""
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
