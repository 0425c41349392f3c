"""Headers of GGUF files: metadata, and the places of tensors. A vocabulary of 150,000 tokens takes a fifth of a second.

A model may be split over several files, `NAME-00001-of-00003.gguf` and so on; then the first is named.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from fleet_edge.verifiers.contract import UnsupportedModel

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_ALIGNMENT: Final = 32
_STRING: Final = 8
_LIST: Final = 9
_LETTERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Letter for `struct`, by type number."""
_MOST_DIMENSIONS: Final = 4
_FIRST_OF_SEVERAL: Final = re.compile(r"-00001-of-(\d{5})\.gguf$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Tensor:
    """Place of a tensor; its shape begins with the slowest dimension."""

    file: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numbers(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: Path) -> GgufHeader:
    """Read the header of a model, of all its files; raises `UnsupportedModel` if one is damaged or missing."""
    header = _read(path)
    count = header.metadata.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        match = _FIRST_OF_SEVERAL.search(path.name)
        if match is None:
            raise UnsupportedModel(f"The GGUF {path} is one of {count} files of a model; name the first of them.")
        for part in range(2, count + 1):
            name = f"{path.name[: match.start()]}-{part:05}-of-{match[1]}.gguf"
            header.tensors.update(_read(path.with_name(name)).tensors)
    return header


def _read(path: Path) -> GgufHeader:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(path, data).parse()
    except (OSError, ValueError, KeyError, struct.error, OverflowError, MemoryError) as error:
        raise damaged(path) from error


def damaged(path: Path) -> UnsupportedModel:
    return UnsupportedModel(f"The GGUF {path} is damaged or missing; fetch it again.")


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def parse(self) -> GgufHeader:
        if self._data[: len(_MAGIC)] != _MAGIC:
            raise ValueError("no GGUF")
        self._at = len(_MAGIC)
        version, tensors, pairs = self._unpack("IQQ")
        if version not in _VERSIONS:
            raise ValueError("unknown version")
        metadata = {}
        for _ in range(pairs):
            key = self._string()
            metadata[key] = self._value(self._unpack("I")[0])
        places = [self._tensor() for _ in range(tensors)]
        step = int(metadata.get("general.alignment", _ALIGNMENT))
        begin = -(-self._at // step) * step
        found = {}
        for name, kind, shape, offset in places:
            elements, size = GGML_QUANT_SIZES[kind]
            tensor = Tensor(self._path, kind, shape, begin + offset, prod(shape) // elements * size)
            if shape[-1] % elements or tensor.offset + tensor.nbytes > len(self._data):
                raise ValueError("a tensor ends behind the file")
            found[name] = tensor
        return GgufHeader(metadata, found)

    def _tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name, (dimensions,) = self._string(), self._unpack("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError("too many dimensions")
        shape = self._unpack(f"{dimensions}Q")
        kind, offset = self._unpack("IQ")
        return name, GGMLQuantizationType(kind), tuple(reversed(shape)), offset

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _LIST:
            return self._unpack(_LETTERS[kind])[0]
        inner, count = self._unpack("IQ")
        if count > len(self._data) - self._at:  # every element takes a byte at least
            raise ValueError("a list ends behind the file")
        if inner == _STRING:
            return [self._string() for _ in range(count)]
        return list(self._unpack(f"{count}{_LETTERS[inner]}"))

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        begin, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise ValueError("a string ends behind the file")
        return self._data[begin : self._at].decode("utf-8", "surrogateescape")

    def _unpack(self, letters: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{letters}", self._data, self._at)
        self._at += struct.calcsize(f"<{letters}")
        return found
