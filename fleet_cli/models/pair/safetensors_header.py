"""Headers of a folder's safetensors files: how many weights there are, and in which format, without reading them."""

import json
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from fleet_cli.models.pair.gguf_header import ModelUnreadable

__all__ = ["FolderWeights", "read_weights"]

_INDEX: Final = "model.safetensors.index.json"
_WHOLE: Final = "model.safetensors"
_LENGTH_BYTES: Final = 8
_LONGEST_HEADER: Final = 100_000_000
"""Bytes; the format's own bound."""


@dataclass(frozen=True, slots=True)
class FolderWeights:
    """The weights of a folder.

    Attributes:
        parameters: Number of elements.
        bytes: As they are stored.
        number_format: The commonest, in the files' words, such as BF16.
    """

    parameters: int
    bytes: int
    number_format: str


def read_weights(folder: Path) -> FolderWeights:
    """Read the headers of a folder's weights.

    Raises:
        ModelUnreadable: There are none, one is missing, or one is cut off.
    """
    elements = Counter[str]()
    total = 0
    for path in _files(folder):
        for kind, count, bytes_ in _entries(path):
            elements[kind] += count
            total += bytes_
    if not elements:
        raise ModelUnreadable(f"The weights in {folder} have no tensor; fetch the model again.")
    return FolderWeights(elements.total(), total, elements.most_common(1)[0][0])


def _files(folder: Path) -> list[Path]:
    # In the order in which transformers looks: others may hold the same weights in another form.
    index = folder / _INDEX
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    if not index.is_file():
        raise ModelUnreadable(f"The folder {folder} has no {_WHOLE}; give a folder that holds a whole model.")
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnreadable(f"The file {index} cannot be read; fetch the model again.") from error
    files = sorted(folder / Path(name).name for name in names)
    if missing := [path for path in files if not path.is_file()]:
        raise ModelUnreadable(f"The folder {folder} lacks {missing[0].name}; fetch the model again, whole.")
    return files


def _entries(path: Path) -> list[tuple[str, int, int]]:
    """Return of each tensor its type, its number of elements and its bytes."""
    damaged = ModelUnreadable(f"The file {path} is damaged; fetch it again.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_LENGTH_BYTES)
            if len(head) < _LENGTH_BYTES:
                raise damaged
            (length,) = struct.unpack("<Q", head)
            if length > min(size - _LENGTH_BYTES, _LONGEST_HEADER):
                raise damaged
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = [
            (str(entry["dtype"]), prod(int(edge) for edge in entry["shape"]), _span(entry)) for entry in header.values()
        ]
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except OSError as error:
        raise ModelUnreadable(f"The file {path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise damaged from error
    if _LENGTH_BYTES + length + end > size:
        raise ModelUnreadable(
            f"The file {path} is cut off: it has {size:,} bytes of {_LENGTH_BYTES + length + end:,}; fetch it again."
        )
    return found


def _span(entry: dict[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end:
        raise ValueError("a tensor ends before it begins")
    return int(end) - int(begin)
