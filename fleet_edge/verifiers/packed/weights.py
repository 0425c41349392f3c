"""Memory that a target model's weights take, from its files' headers, before anything of them is loaded."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gguf import GGUFReader

from fleet_edge.verifiers.contract import VerifierError

__all__ = ["check_memory", "folder_numbers", "gguf_numbers"]

_HEADER: Final = 8  # bytes that hold the length of a safetensors file's header
_MOST_HEADER: Final = 100 << 20
_INDEX: Final = "model.safetensors.index.json"
_GIGA: Final = 1e9


def check_memory(*, name: str, needed: int | None, available: int | None, number: str) -> None:
    """Check that weights have room; where one of the two is not known they are taken to have it.

    Args:
        name: Of the model, as the settings have it.
        needed: Bytes.
        available: Bytes.
        number: Number format.

    Raises:
        VerifierError: They have none.
    """
    if needed is None or available is None or needed <= available:
        return
    raise VerifierError(
        f"Loading {name} in {number} takes {needed / _GIGA:.1f} GB of memory, and {available / _GIGA:.1f} GB are left; "
        "end what else runs here, set dtype to bfloat16, or take a smaller target model, or a quantized GGUF with the "
        "engine llama.cpp."
    )


def folder_numbers(folder: Path) -> int | None:
    """Return how many numbers the weights of a folder are; None where its files do not say."""
    try:
        return sum(count for file in _files(folder) for count in _counts(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # damage is told by whoever loads them


def gguf_numbers(path: Path) -> int | None:
    """Return how many numbers the weights of a GGUF are; None if it is damaged."""
    try:
        return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    except (ValueError, IndexError, KeyError, OSError):
        return None


def _files(folder: Path) -> list[Path]:
    """Return the files that transformers would load: others may hold the same weights in another form."""
    index = folder / _INDEX
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / str(name) for name in names]


def _counts(file: Path) -> Iterator[int]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_HEADER), "little")
        if length > _MOST_HEADER:
            raise ValueError("no header")
        header = json.loads(stream.read(length))
    for name, tensor in header.items():
        if name != "__metadata__":
            yield math.prod(int(size) for size in tensor["shape"])
