"""Tensors of a folder: which safetensors hold them, where and in which number format."""

import json
from pathlib import Path
from typing import Final

from fleet_common.gguf_files import StoredTensor
from fleet_edge.verifiers.contract import UnsupportedModel

_LENGTH_BYTES: Final = 8  # of the length of the header
_MAX_HEADER: Final = 100 << 20


Tensors = dict[str, StoredTensor[str]]
"""By name, in a number format such as BF16."""


def folder_tensors(folder: Path) -> Tensors:
    """Read the headers of a folder's safetensors; raises `UnsupportedModel` if a file is missing or cut off."""
    found: Tensors = {}
    for path in _safetensors(folder):
        try:
            found |= _tensors_of(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnsupportedModel(f"The file {path} is missing, damaged or cut off; fetch it again.") from error
    if not found:
        raise UnsupportedModel(f"The weights in {folder} have no tensor; fetch the model again.")
    return found


def _tensors_of(path: Path) -> Tensors:
    with path.open("rb") as file:
        begin = _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(min(begin, _MAX_HEADER) - _LENGTH_BYTES))
    header.pop("__metadata__", None)
    found: Tensors = {}
    for name, tensor in header.items():
        first, end = map(int, tensor["data_offsets"])
        shape, offset = tuple(tensor["shape"]), begin + first
        found[name] = StoredTensor(path, str(tensor["dtype"]), shape, offset, end - first)
    if path.stat().st_size < max((each.offset + each.nbytes for each in found.values()), default=0):
        raise ValueError("cut off")
    return found


def _safetensors(folder: Path) -> list[Path]:
    # In the order in which transformers looks: others may hold the same weights in another form.
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModel(f"The file {index} cannot be read; fetch the model again.") from error
    return sorted(folder / Path(name).name for name in names)
