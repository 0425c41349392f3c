"""Keys and values in a file, from which a restarted edge takes the pages that are whole.

    header    what the pages are of: model, release, shape; written last, so that a file without it is void
    records   one for each page: its tokens, the page before it, whose it is, and a checksum
    keys      as `Pages` has them
    values

A page is recorded once all of its tokens are computed, and its record is erased before it is written to again. A page
is taken only if its record and its content are undamaged, and those of all pages before it. As rows do not depend on
the batch, it has the same bits as if it were computed again.

The file holds what people wrote: only its owner may read it. A start erases what was not used for a time, and a command
deletes it.
"""

import fcntl
import hashlib
import logging
import math
import mmap
import os
import time
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from fleet_edge.verifiers.blocks.checksums import checksum
from fleet_edge.verifiers.blocks.kv import PAGE, Halves, page_bytes, shapes

_log = logging.getLogger(__name__)

_HEADER_BYTES: Final = 4096
_SPARE_BYTES: Final = 64  # loops read whole vectors, behind the last number too
_HASH_BYTES: Final = 16
_RECORD: Final = np.dtype(
    [
        ("whole", np.uint32),
        ("tokens", np.int32, PAGE),
        ("hash", np.uint8, _HASH_BYTES),  # of the page's tokens and those before it, and of whose they are
        ("before", np.uint8, _HASH_BYTES),
        ("checksum", np.uint8, _HASH_BYTES),  # of keys and values
        ("owner", np.uint8, 64),  # UTF-8, filled up with zeros
        ("used_at", np.float64),  # seconds since the epoch
    ]
)
_FIRST: Final = bytes(_HASH_BYTES)


@dataclass(frozen=True, slots=True)
class KeptPages:
    """Whole pages of tokens that an earlier process computed, and the device that they belong to."""

    owner: str
    tokens: "array[int]"
    pages: list[int]
    used_at: float


class PageFile:
    """`PageMemory` in a file, which one process uses at a time."""

    def __init__(self, path: Path, identity: str, *, layers: int, kv_heads: int, dim: int, count: int) -> None:
        """Open or make the file, and lock it.

        Raises OSError if that is not possible, another process has it, or there is no room for all pages.
        """
        size = page_bytes(layers, kv_heads, dim)
        self._half = size // 2
        self._records_at = _HEADER_BYTES
        self._keys_at = _rounded(self._records_at + count * _RECORD.itemsize)
        self._values_at = _rounded(self._keys_at + count * self._half)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by forked processes
            header = f"pages1 {identity} {layers} {kv_heads} {dim} {count}".encode().ljust(_HEADER_BYTES, b"\0")
            whole = self._values_at + count * self._half + _SPARE_BYTES
            if os.fstat(self._file).st_size != whole or os.pread(self._file, _HEADER_BYTES, 0) != header:
                os.ftruncate(self._file, 0)
            _check_room(self._file, count * size)
            if not os.fstat(self._file).st_size:
                os.ftruncate(self._file, whole)
                os.pwrite(self._file, header, 0)
            self._memory = mmap.mmap(self._file, 0)
        except BaseException:
            os.close(self._file)
            raise
        keys, values = shapes(layers, kv_heads, dim, count)
        self.keys: Halves = np.frombuffer(self._memory, np.uint16, math.prod(keys), self._keys_at).reshape(keys)
        self.values: Halves = np.frombuffer(self._memory, np.uint16, math.prod(values), self._values_at).reshape(values)
        self._records: Any = np.frombuffer(self._memory, _RECORD, count, self._records_at)

    @property
    def is_deleted(self) -> bool:
        """Whether somebody has deleted the file, so that what it held is to be forgotten."""
        return os.fstat(self._file).st_nlink == 0

    def provide(self, page: int) -> None:
        # A page without room in the file would end the process when it is written to.
        for begin in (self._keys_at, self._values_at):
            os.posix_fallocate(self._file, begin + page * self._half, self._half + _SPARE_BYTES)

    def forget(self, page: int) -> None:
        self._records[page]["whole"] = 0

    def record(self, page: int, tokens: Sequence[int], before: int | None, owner: str) -> None:
        """Record a page whose keys and values are complete; `before` is the sequence's page before it."""
        record = self._records[page]
        if before is not None and not self._records[before]["whole"]:
            return
        previous = _FIRST if before is None else self._records[before]["hash"].tobytes()
        its = np.asarray(tokens, np.int32)
        record["tokens"], record["before"] = its, np.frombuffer(previous, np.uint8)
        record["owner"] = np.frombuffer(owner.encode()[:64].ljust(64, b"\0"), np.uint8)
        record["hash"] = np.frombuffer(_hash(previous, record), np.uint8)
        record["checksum"] = np.frombuffer(self._sum(page), np.uint8)
        record["used_at"] = time.time()
        record["whole"] = 1

    def note_use(self, pages: Iterable[int]) -> None:
        self._records["used_at"][list(pages)] = time.time()

    def sequences(self, *, vocabulary: int, keep_s: float, threads: int) -> list[KeptPages]:
        """Return the sequences that can be taken over, the least recently used first; forget all other pages."""
        records = self._records
        now = time.time()
        recent = (records["whole"] == 1) & (records["used_at"] > now - keep_s)
        fits = (records["tokens"] >= 0).all(1) & (records["tokens"] < vocabulary).all(1)
        places = [int(place) for place in np.nonzero(recent & fits)[0]]
        with ThreadPoolExecutor(threads) as pool:
            good = [place for place, is_good in zip(places, pool.map(self._is_good, places), strict=True) if is_good]
        chains = _chains({records[place]["hash"].tobytes(): place for place in reversed(good)}, records)
        taken = {page for chain in chains for page in chain}
        for place in np.nonzero(records["whole"])[0]:
            if int(place) not in taken:
                records[place] = np.zeros(1, _RECORD)[0]
        found = [
            KeptPages(
                bytes(records[chain[-1]]["owner"]).rstrip(b"\0").decode(errors="replace"),
                array("i", records["tokens"][chain].reshape(-1).tobytes()),
                chain,
                float(records[chain[-1]]["used_at"]),
            )
            for chain in chains
        ]
        return sorted(found, key=lambda each: each.used_at)

    def _is_good(self, place: int) -> bool:
        record = self._records[place]
        return bool(
            record["hash"].tobytes() == _hash(record["before"].tobytes(), record)
            and record["checksum"].tobytes() == self._sum(place)
        )

    def _sum(self, page: int) -> bytes:
        return bytes.fromhex(checksum(self.keys[page]) + checksum(self.values[page]))[:_HASH_BYTES]


def _hash(before: bytes, record: Any) -> bytes:
    return hashlib.sha256(before + record["owner"].tobytes() + record["tokens"].tobytes()).digest()[:_HASH_BYTES]


def _chains(places: dict[bytes, int], records: Any) -> list[list[int]]:
    """Return the longest sequences of pages, each from a first page to one that none follows."""
    followed = {records[place]["before"].tobytes() for place in places.values()}
    chains = []
    for own, last in places.items():
        if own in followed:
            continue
        chain, before = [last], records[last]["before"].tobytes()
        while before != _FIRST and (place := places.get(before)) is not None:
            chain.append(place)
            before = records[place]["before"].tobytes()
        if before == _FIRST:
            chains.append(chain[::-1])
    return chains


def _rounded(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _check_room(descriptor: int, needed: int) -> None:
    """Check that a file can grow to hold all pages; raises OSError."""
    file, system = os.fstat(descriptor), os.fstatvfs(descriptor)
    free = system.f_bavail * system.f_frsize + 512 * file.st_blocks
    if free < needed:
        raise OSError(f"{needed} bytes are needed and {free} are free")
