"""GGUF files: headers without weights, and files with a target's vocabulary only."""

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

from fleet_admin.models.files import PARTIAL, ModelsError, seal
from fleet_common.extras import install_command
from schemas.vocabulary import Vocabulary, token_strings

Value = int | float | str | tuple[int | float, ...]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING: Final = 8
_ARRAY: Final = 9
_NUMBERS: Final[Mapping[int, str]] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Letter for `struct`, by type number."""

_LONGEST_LIST: Final = 4096
_MOST_DIMENSIONS: Final = 8
_ALIGNMENT: Final = 32
_SHARD: Final = re.compile(r"-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf$", re.IGNORECASE)


class ModelUnreadable(ModelsError):  # noqa: N818 - reads as what it says
    """The file or folder is no readable model."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    name: str
    parameters: int  # number of elements
    kind: int  # number of its type
    offset: int  # bytes from the beginning of all tensor data


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Header of a model; of several files, that of the first with the tensors of all."""

    metadata: Mapping[str, Value]  # numbers, strings and short lists of numbers
    tensors: tuple[TensorEntry, ...]
    weight_bytes: int  # of all tensors

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors)

    def of(self, key: str) -> Value | None:
        """Return the value of a key below the architecture's name."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def number(self, key: str, default: int = 0) -> int:
        """Return the number of such a key; of a list, the largest."""
        found = self.of(key)
        if isinstance(found, tuple):
            found = max((each for each in found if isinstance(each, int)), default=default)
        return found if isinstance(found, int) else default


def read_header(path: Path) -> GgufHeader:
    """Read a GGUF's header, and those of the model's other files."""
    metadata, tensors, weights = _read(path)
    for other in _other_files(path, metadata):
        _, more, bytes_ = _read(other)
        tensors, weights = (*tensors, *more), weights + bytes_
    if not metadata.get("general.architecture"):
        raise ModelUnreadable(f"The GGUF {path} does not say of which architecture it is; convert the model again.")
    return GgufHeader(metadata, tensors, weights)


def _other_files(path: Path, metadata: Mapping[str, Value]) -> list[Path]:
    parts = metadata.get("split.count", 1)
    if not isinstance(parts, int) or parts < 2:  # noqa: PLR2004 - a whole model
        return []
    match = _SHARD.search(path.name)
    if match is None or int(match["part"]) != 1:
        raise ModelUnreadable(f"The GGUF {path} is one of {parts} files of a model; name the first, …-00001-of-….gguf.")
    others = [
        path.with_name(f"{path.name[: match.start()]}-{part:05}-of-{match['parts']}.gguf")
        for part in range(2, int(match["parts"]) + 1)
    ]
    if missing := [other for other in others if not other.is_file()]:
        raise ModelUnreadable(f"Of the model {path} the file {missing[0].name} is missing; put it next to the others.")
    return others


def _read(path: Path) -> tuple[dict[str, Value], tuple[TensorEntry, ...], int]:
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ModelUnreadable(f"The file {path} is no GGUF; convert the model, or fetch one that is.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).parse()
    except FileNotFoundError:
        raise ModelUnreadable(f"There is no file {path}; check the name.") from None
    except OSError as error:
        raise ModelUnreadable(f"The file {path} cannot be read: {error.strerror or error}.") from error


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = len(_MAGIC)

    def parse(self) -> tuple[dict[str, Value], tuple[TensorEntry, ...], int]:
        version, tensor_count, pair_count = self._unpack("<IQQ")
        if version not in _VERSIONS:
            raise ModelUnreadable(
                f"The GGUF {self._path} is of version {version}, and {_VERSIONS[0]} and {_VERSIONS[1]} can be read; "
                "convert the model again."
            )
        metadata: dict[str, Value] = {}
        for _ in range(pair_count):
            key = self._string()
            value = self._value(self._number("I"))
            if value is not None:
                metadata[key] = value
        tensors = tuple(self._tensor() for _ in range(tensor_count))
        return metadata, tensors, self._weights(tensors, metadata)

    def _weights(self, tensors: tuple[TensorEntry, ...], metadata: Mapping[str, Value]) -> int:
        """Return the bytes of all tensors, whose data must be in the file."""
        from gguf.constants import GGML_QUANT_SIZES  # a table that changes with llama.cpp's types

        alignment = metadata.get("general.alignment", _ALIGNMENT)
        step = alignment if isinstance(alignment, int) and alignment > 0 else _ALIGNMENT
        begin = -(-self._at // step) * step
        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        total, end = 0, begin if tensors else 0
        for tensor in tensors:
            if tensor.kind not in sizes:
                return self._size - begin  # a type newer than the table
            elements, bytes_ = sizes[tensor.kind]
            length = -(-tensor.parameters // elements) * bytes_
            total, end = total + length, max(end, begin + tensor.offset + length)
        if end > self._size:
            raise self._cut_off(f"its weights end at byte {end:,}")
        return total

    def _tensor(self) -> TensorEntry:
        name = self._string()
        dimensions = self._number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self._damaged()
        shape = self._unpack(f"<{dimensions}Q")
        kind, offset = self._unpack("<IQ")
        return TensorEntry(name, prod(shape), kind, offset)

    def _value(self, kind: int) -> Value | None:
        """Read a value; None for a list that is skipped."""
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(self._letter(kind))
        inner, count = self._unpack("<IQ")
        if inner == _STRING:
            if count * 8 > self._size - self._at:
                raise self._cut_off("a list goes on behind its end")
            for _ in range(count):
                self._skip(self._number("Q"))
            return None
        letter = self._letter(inner)
        width = struct.calcsize(f"<{letter}")
        if count > _LONGEST_LIST:
            self._skip(count * width)
            return None
        return self._unpack(f"<{count}{letter}")

    def _letter(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise self._damaged()
        return _NUMBERS[kind]

    def _string(self) -> str:
        length = self._number("Q")
        begin = self._at
        self._skip(length)
        return self._data[begin : self._at].decode("utf-8", "replace")

    def _number(self, letter: str) -> int:
        number: int = self._unpack(f"<{letter}")[0]
        return number

    def _unpack(self, form: str) -> tuple[int, ...]:
        begin = self._at
        self._skip(struct.calcsize(form))
        return struct.unpack_from(form, self._data, begin)

    def _skip(self, count: int) -> None:
        if count > self._size - self._at:
            raise self._cut_off("its header goes on behind its end")
        self._at += count

    def _cut_off(self, what: str) -> ModelUnreadable:
        return ModelUnreadable(
            f"The GGUF {self._path} is cut off: it has {self._size:,} bytes, and {what}; fetch it again, whole."
        )

    def _damaged(self) -> ModelUnreadable:
        return ModelUnreadable(f"The GGUF {self._path} is damaged; fetch it again.")


_KEPT: Final = ("general.", "tokenizer.")
_TOKENS: Final = "tokenizer.ggml.tokens"
_VERSION: Final = 3


class VocabularyUnusable(ModelsError):  # noqa: N818 - reads as what it says
    """The file has no usable vocabulary."""


def write_vocabulary(target: Path, out: Path) -> Vocabulary:
    """Write the vocabulary of a target's GGUF to its own file, and return it.

    Takes about ten seconds per 250,000 tokens, because the library reads them one by one. Raises `VocabularyUnusable`,
    or another `ModelsError` if the file cannot be written.
    """
    reader = _reader(target)
    if out.exists() and out.samefile(target):
        raise ModelsError(f"{out} is the target itself; name another file with --out.")
    fields = [
        b"".join(part.tobytes() for part in field.parts)
        for name, field in reader.fields.items()
        if name.startswith(_KEPT)
    ]
    head = b"GGUF" + struct.pack("<IQQ", _VERSION, 0, len(fields))
    body = head + b"".join(fields)
    partial = out.with_name(f"{PARTIAL}{out.name}")
    try:
        partial.write_bytes(body + bytes(-len(body) % _ALIGNMENT))
        seal(partial)
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ModelsError(f"The file {out} cannot be written: {error.strerror or error}.") from error
    field = reader.fields[_TOKENS]
    return Vocabulary.of(token_strings(str(bytes(field.parts[at]), "utf-8", "surrogateescape") for at in field.data))


def _reader(path: Path):  # type: ignore[no-untyped-def]  # noqa: ANN202 - the library is untyped
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelsError(f"Reading a GGUF needs gguf; install it with: {install_command('edge')}") from None
    if path.is_dir():
        raise VocabularyUnusable(
            f"{path} is a folder; give a GGUF of the same model, in any quantization: a device reads it with llama.cpp."
        )
    try:
        reader = GGUFReader(path)
    except FileNotFoundError:
        raise VocabularyUnusable(f"There is no file {path}; give a GGUF of the target model.") from None
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise VocabularyUnusable(f"The file {path} is no GGUF, or is damaged; fetch it again.") from error
    if reader.get_field(_TOKENS) is None:
        raise VocabularyUnusable(f"The GGUF {path} has no tokenizer; choose a file of a whole model.")
    return reader
