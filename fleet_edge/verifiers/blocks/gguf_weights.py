"""Weights and metadata of a GGUF. Tensors are read one at a time, and packed as they lie in the file."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from fleet_edge.verifiers.blocks.architectures import Geometry, of_gguf
from fleet_edge.verifiers.blocks.gguf_reader import FastGguf
from fleet_edge.verifiers.blocks.weights import Weights, pack_gguf
from fleet_edge.verifiers.contract import UnsupportedModel

_REQUIRED: Final = object()
_KEPT: Final = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0)


class GgufWeights:
    """A GGUF, open to be loaded. Raises `UnsupportedModel` if it is damaged or of an architecture not served."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            reader = FastGguf(path)
            self._fields = reader.fields
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            self.geometry: Geometry = of_gguf(self.get, self.vector)
        except (ValueError, IndexError, KeyError, OSError, TypeError, ZeroDivisionError) as error:
            raise damaged(path) from error

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        field = self._fields.get(key)
        if field is None:
            if default is _REQUIRED:
                raise KeyError(key)
            return default
        return field.contents()

    @property
    def number_format(self) -> str:
        """The most frequent number format of the weights."""
        return str(
            Counter(tensor.tensor_type.name for tensor in self._tensors.values() if len(tensor.shape) > 1).most_common(
                1
            )[0][0]
        )

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights: 5 and 6 bits become 8, with a scale of 16 bits for 32 weights."""
        return sum(
            int(tensor.n_bytes) if tensor.tensor_type in _KEPT else int(tensor.n_elements) * 34 // 32
            for tensor in self._tensors.values()
        )

    @property
    def largest_bytes(self) -> int:
        return max(int(tensor.n_bytes) for tensor in self._tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def vector(self, name: str) -> npt.NDArray[np.float32] | None:
        """Return a tensor in float32, for norms, biases and routers; None if there is none."""
        if name not in self._tensors:
            return None
        raw, tensor = self._read(name), self._tensors[name]
        floats: npt.NDArray[np.float32] = dequantize(raw, tensor.tensor_type).astype(np.float32, copy=False)
        return floats.reshape(tuple(reversed(tensor.shape.tolist())))

    def pack(self, names: Sequence[str], *, orders: Sequence[npt.NDArray[np.intp] | None] = ()) -> list[Weights]:
        """Return tensors as packed weights; neighbours of one type are one weight, in `orders` of their rows."""
        groups: list[tuple[Any, list[npt.NDArray[np.uint8]]]] = []
        for name, order in zip(names, orders or [None] * len(names), strict=True):
            kind, raw = self._tensors[name].tensor_type, self._rows(name)
            raw = raw if order is None else raw[order]
            if groups and groups[-1][0] == kind and groups[-1][1][0].shape[1] == raw.shape[1]:
                groups[-1][1].append(raw)
            else:
                groups.append((kind, [raw]))
        width = int(self._tensors[names[0]].shape[0])
        return [pack_gguf(np.concatenate(parts) if len(parts) > 1 else parts[0], kind, width) for kind, parts in groups]

    def pack_expert(self, names: Sequence[str], expert: int) -> list[Weights]:
        """Return one expert's matrices of tensors `[experts, outputs, inputs]` as packed weights."""
        parts = []
        for name in names:
            tensor = self._tensors[name]
            experts, outputs = int(tensor.shape[2]), int(tensor.shape[1])
            size = int(tensor.n_bytes) // experts
            parts.append(self._read(name, skip=expert * size, size=size).reshape(outputs, -1))
        kinds = [self._tensors[name].tensor_type for name in names]
        width = int(self._tensors[names[0]].shape[0])
        if len(set(kinds)) == 1:
            return [pack_gguf(np.concatenate(parts), kinds[0], width)]
        return [pack_gguf(part, kind, width) for part, kind in zip(parts, kinds, strict=True)]

    def _rows(self, name: str) -> npt.NDArray[np.uint8]:
        return self._read(name).reshape(int(self._tensors[name].shape[1]), -1)

    def _read(self, name: str, *, skip: int = 0, size: int = -1) -> npt.NDArray[np.uint8]:
        """Return bytes of a tensor; read, not mapped, so that the file does not count as memory of the process."""
        tensor = self._tensors[name]
        wanted = int(tensor.n_bytes) if size < 0 else size
        raw = np.fromfile(self._path, np.uint8, wanted, offset=int(tensor.data_offset) + skip)
        if len(raw) != wanted:
            raise damaged(self._path)
        return raw


def damaged(path: Path) -> UnsupportedModel:
    return UnsupportedModel(f"The GGUF {path} is damaged or lacks metadata; fetch it again.")
