"""Packed weights in a file, which later starts map into memory instead of packing the model again.

The file holds each weight as it lies in memory, at the beginning of a page, then an index in JSON, then a trailer of a
fixed size. It belongs to one source and one release: another size, time or beginning of a file of the source, or other
code, makes it void. Edges of one machine share the memory, because they map the same file.
"""

import hashlib
import json
import logging
import mmap
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.checksums import checksum
from fleet_edge.verifiers.blocks.compiler import sources_hash
from fleet_edge.verifiers.blocks.layout import Format
from fleet_edge.verifiers.blocks.parts import WeightFile
from fleet_edge.verifiers.blocks.weights import Weights

Bytes = npt.NDArray[np.uint8]
Packed = dict[str, list[Weights]]
"""Packed weights by the names of their tensors, as `Model` asks for them."""

_log = logging.getLogger(__name__)

KEEPING: Final = "keep-weights"
"""Name of the thread that writes the file."""
_PART: Final = ".part"
_TRAILER: Final = struct.Struct("<8sQ32s")  # magic, bytes of the index, its SHA-256
_MAGIC: Final = b"weights1"
_SPARE_BYTES: Final = 64  # products read whole vectors, behind the last number too
_BEGINNING: Final = 1 << 20  # bytes of each file of the source that are compared
_UNUSED_S: Final = 30 * 86_400.0
_FREE_SHARE: Final = 0.1
_FREE_BYTES: Final = 10_000_000_000
"""The file leaves this share of the disk or this size free, whichever is smaller."""
_MAP_NORESERVE: Final = 0x4000


def fingerprint(files: Iterable[Path], *, bits: int) -> str:
    """Return a hash of the packing and of the files of a source: names, sizes, times and beginnings."""
    found = hashlib.sha256(f"{sources_hash()} {bits}".encode())
    for path in files:
        stat = path.stat()
        with path.open("rb") as file:
            found.update(file.read(_BEGINNING))
        found.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return found.hexdigest()


class CachedWeights:
    """`WeightFile` over another one, whose packed weights are kept for later starts where that is possible.

    Attributes:
        proof: What `keep` was given by the start that wrote the file.
    """

    def __init__(
        self,
        file: WeightFile,
        path: Path | None,
        identity: str,
        *,
        threads: int,
        on_bytes: Callable[[int], None] = lambda _count: None,
    ) -> None:
        """Map the file `path` of an earlier start, if there is one with this identity (see `fingerprint`).

        Without a path nothing is kept. `on_bytes` receives the sizes of weights as they are mapped or packed.
        """
        self.geometry = file.geometry
        self._file = file
        self._path = path
        self._identity = identity
        self._packed: Packed = {}
        self._on_bytes = on_bytes
        self._found, self.proof = ({}, "") if path is None else _read(path, identity, threads, on_bytes)

    @property
    def is_mapped(self) -> bool:
        return bool(self._found)

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def require_shapes(self) -> None:
        self._file.require_shapes()

    def vector(self, name: str) -> npt.NDArray[np.float32] | None:
        return self._file.vector(name)

    def pack(self, names: Sequence[str], *, orders: Sequence[npt.NDArray[np.intp] | None] = ()) -> list[Weights]:
        return self._get("+".join(names), lambda: self._file.pack(names, orders=orders))

    def _get(self, key: str, pack: Callable[[], list[Weights]]) -> list[Weights]:
        found = self._found.get(key)
        if found is None:
            found = self._packed[key] = pack()
            self._on_bytes(sum(each.nbytes for each in found))
        return found

    def keep(self, proof: str = "") -> None:
        """Write what was packed to the file; a failure costs later starts time only."""
        if self._path is None or not self._packed:
            return
        try:
            _write(self._path, self._identity, self._found | self._packed, proof)
        except OSError as error:
            _log.warning("Packed weights cannot be kept, so that the next start packs them again: %s", error)

    def keep_later(self, proof: str) -> None:
        """Write the file on a thread that does not delay the start, nor the end of the process."""
        threading.Thread(target=self.keep, args=[proof], name=KEEPING, daemon=True).start()


def _read(path: Path, wanted: str, threads: int, on_bytes: Callable[[int], None]) -> tuple[Packed, str]:
    """Return the weights and the proof of a file; none if it is missing, damaged, or of another source."""
    try:
        with path.open("rb") as file:
            found = _mapped(file.fileno(), wanted, threads, on_bytes)
        os.utime(path)
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        _log.warning("The kept weights %s do not serve and are made again: %s", path, error)
        with suppress(OSError):
            path.unlink()
        return {}, ""
    return found


def _mapped(descriptor: int, wanted: str, threads: int, on_bytes: Callable[[int], None]) -> tuple[Packed, str]:
    size = os.fstat(descriptor).st_size
    # Private, since compiled loops take arrays that can be written to; nobody does, so all of it is shared.
    memory = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE)
    magic, length, digest = _TRAILER.unpack(memory[-_TRAILER.size :])
    content = memory[-_TRAILER.size - length : -_TRAILER.size]
    if magic != _MAGIC or hashlib.sha256(content).digest() != digest:
        raise ValueError("it is cut off or damaged")
    index = json.loads(content)
    if index["identity"] != wanted:
        raise ValueError("the model or the release has changed")
    whole = np.frombuffer(memory, np.uint8)

    def weight(its: Mapping[str, Any]) -> Weights:
        shape = its["shape"]
        data = whole[its["offset"] :][: shape[0] * shape[1]]
        if checksum(data) != its["checksum"]:
            raise ValueError("its content is damaged")
        on_bytes(data.nbytes)
        kind = Format(its["bits"], its["zero"], its["minimums"], tuple(its["table"]))
        return Weights(data.reshape(shape), its["outputs"], its["inputs"], kind, its["factor"])

    with ThreadPoolExecutor(threads) as pool:
        waiting = {key: [pool.submit(weight, each) for each in its] for key, its in index["weights"].items()}
        return {key: [each.result() for each in its] for key, its in waiting.items()}, str(index["proof"])


def _write(path: Path, identity: str, packed: Packed, proof: str) -> None:
    for other in path.parent.iterdir():
        of_killed = other.suffix == _PART and other.stem.partition(".")[0] == path.stem
        if of_killed or other.stat().st_mtime < time.time() - _UNUSED_S:
            other.unlink(missing_ok=True)
    needed = sum(each.nbytes for its in packed.values() for each in its)
    usage = shutil.disk_usage(path.parent)
    left = min(int(_FREE_SHARE * usage.total), _FREE_BYTES)
    if usage.free - needed < left:
        raise OSError(f"{needed} bytes would leave less than {left} bytes of the disk free; make room on it")
    part = path.with_suffix(f".{os.getpid()}{_PART}")
    index: dict[str, list[dict[str, Any]]] = {}
    with open(part, "xb", opener=_private) as file:
        for key, its in packed.items():
            for each in its:
                file.seek(-(-file.tell() // mmap.PAGESIZE) * mmap.PAGESIZE)
                index.setdefault(key, []).append(_described(each, file.tell()))
                file.write(each.tiles.data)
                file.write(bytes(_SPARE_BYTES))
        content = json.dumps({"identity": identity, "proof": proof, "weights": index}).encode()
        file.write(content + _TRAILER.pack(_MAGIC, len(content), hashlib.sha256(content).digest()))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _described(weights: Weights, offset: int) -> dict[str, Any]:
    its = weights.format
    return {
        "offset": offset,
        "shape": weights.tiles.shape,
        "outputs": weights.outputs,
        "inputs": weights.inputs,
        "bits": its.bits,
        "zero": its.zero,
        "minimums": its.minimums,
        "table": its.table,
        "factor": weights.factor,
        "checksum": checksum(weights.tiles),
    }


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
