"""Weights of a GGUF. Tensors are read one at a time, and packed as they lie in the file."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from fleet_common.gguf_files import GgufHeader, GgufUnreadable, StoredTensor, damaged, read_header
from fleet_edge.verifiers.blocks.architectures import of_gguf
from fleet_edge.verifiers.blocks.geometry import Geometry
from fleet_edge.verifiers.blocks.tensors import unfit_tensor
from fleet_edge.verifiers.contract import UnsupportedModel

if TYPE_CHECKING:
    from fleet_edge.verifiers.blocks.weights import Weights

_REQUIRED: Final = object()
_Kind = GGMLQuantizationType
Tensor = StoredTensor[GGMLQuantizationType]
_KEPT: Final = (_Kind.Q4_0, _Kind.Q4_1, _Kind.Q8_0, _Kind.IQ4_NL)
_REPACKED: Final = {_Kind.Q4_K: 20 / 32, _Kind.IQ4_XS: 18 / 32, _Kind.MXFP4: 18 / 32}
"""Bytes of a weight: a scale for 32 of them, and for Q4_K a minimum."""
_EIGHT_BITS: Final = 34 / 32


class GgufWeights:
    """A GGUF, open to be loaded. Raises `UnsupportedModel` if it is damaged or of an architecture not served."""

    def __init__(self, path: Path, *, mtp: bool = False) -> None:
        """Open a file; with `mtp` to be loaded with the layer that proposes tokens, which it MUST have."""
        self._path = path
        try:
            header = read_header(path)
        except GgufUnreadable as error:
            raise UnsupportedModel(str(error)) from error
        self._tensors = header.tensors
        found = _geometry(path, header, self.vector)
        if mtp and found.mtp is None:
            raise UnsupportedModel(
                f"The GGUF {path} has no layer that proposes tokens (MTP); fetch one whose metadata "
                "has nextn_predict_layers = 1, or set edge_draft to a small model."
            )
        self.geometry: Geometry = found if mtp else replace(found, mtp=None)

    @property
    def files(self) -> list[Path]:
        return sorted({each.file for each in self._tensors.values()})

    @property
    def number_format(self) -> str:
        """The most frequent number format of the weights."""
        kinds = Counter(each.kind.name for each in self._tensors.values() if len(each.shape) > 1)
        return str(kinds.most_common(1)[0][0])

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(
            each.nbytes if each.kind in _KEPT else int(each.numbers * _REPACKED.get(each.kind, _EIGHT_BITS))
            for each in self._tensors.values()
        )

    @property
    def largest_bytes(self) -> int:
        return max(each.nbytes for each in self._tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def require_shapes(self) -> None:
        unfit = unfit_tensor(self.geometry, lambda name: self._tensors[name].shape if name in self._tensors else None)
        if unfit is not None:
            self._tensor(unfit)  # which may be missing
            raise UnsupportedModel(str(damaged(self._path)))

    def vector(self, name: str) -> npt.NDArray[np.float32] | None:
        """Return a tensor in float32, for norms, biases, routers and scales; None if there is none."""
        if name not in self._tensors:
            return None
        tensor = self._tensors[name]
        try:
            floats = dequantize(_read(tensor).reshape(*tensor.shape[:-1], -1), tensor.kind)
        except NotImplementedError as error:  # a kind of integers
            raise UnsupportedModel(str(damaged(self._path))) from error
        return np.asarray(floats, np.float32).reshape(tensor.shape)

    def pack(self, names: Sequence[str], *, orders: Sequence[npt.NDArray[np.intp] | None] = ()) -> "list[Weights]":
        """Return tensors as packed weights; neighbours of one type are one weight, in `orders` of their rows."""
        parts = []
        for name, order in zip(names, orders or [None] * len(names), strict=True):
            tensor = self._tensor(name)
            raw = _read(tensor).reshape(tensor.numbers // tensor.shape[-1], -1)
            parts.append((tensor, raw if order is None else raw[order]))
        return self._pack(parts)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise UnsupportedModel(f"The GGUF {self._path} lacks the tensor {name}; fetch it again, whole.")
        return self._tensors[name]

    def _pack(self, parts: Sequence[tuple[Tensor, npt.NDArray[np.uint8]]]) -> "list[Weights]":
        from fleet_edge.verifiers.blocks.weights import pack_gguf  # noqa: PLC0415 - to check a file needs no numba

        groups: list[tuple[Tensor, list[npt.NDArray[np.uint8]]]] = []
        for tensor, raw in parts:
            if groups and groups[-1][0].kind == tensor.kind and groups[-1][0].shape[-1] == tensor.shape[-1]:
                groups[-1][1].append(raw)
            else:
                groups.append((tensor, [raw]))
        try:
            return [
                pack_gguf(np.concatenate(raws) if len(raws) > 1 else raws[0], tensor.kind, tensor.shape[-1])
                for tensor, raws in groups
            ]
        except (ValueError, NotImplementedError) as error:
            raise UnsupportedModel(
                f"The GGUF {self._path} has weights that the engine blocks cannot serve: {error}; fetch the model in "
                "Q4_0, Q4_K_M or Q8_0."
            ) from error


def _geometry(path: Path, header: GgufHeader, vector: Callable[[str], npt.NDArray[np.float32] | None]) -> Geometry:
    def get(key: str, default: Any = _REQUIRED) -> Any:
        return header.metadata[key] if default is _REQUIRED else header.metadata.get(key, default)

    try:
        return of_gguf(get, vector, lambda name: name in header.tensors)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise UnsupportedModel(str(damaged(path))) from error


def _read(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """Return the bytes of a tensor; read, not mapped, so that the file does not count as memory of the process."""
    raw = np.fromfile(tensor.file, np.uint8, tensor.nbytes, offset=tensor.offset)
    if len(raw) != tensor.nbytes:
        raise UnsupportedModel(str(damaged(tensor.file)))
    return raw
