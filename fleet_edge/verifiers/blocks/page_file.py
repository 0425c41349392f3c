"""Keys and values in a file, from which a restarted edge takes what is undamaged.

    header    what the pages are of: model, release, shape; written last, so that a file without it is void
    records   one for each page: its tokens, the page before it, whose it is, and checksums
    keys      as `Pages` has them
    values

A page's tokens are recorded once they are computed, every few of them with checksums of their own until the page is
whole. Before they are written again, the record is cut. A page is taken only if its record and its content are
undamaged, and those of all pages before it. As rows do not depend on the batch, it has the same bits as if it were
computed again.

The file holds what people wrote: only its owner may read it. What was not used for a time is erased by a running edge
and by a start, and a command deletes the file.
"""

import fcntl
import hashlib
import logging
import math
import mmap
import os
import time
from array import array
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.checksums import checksum
from fleet_edge.verifiers.blocks.kv import PAGE, Halves, page_bytes, shapes

Bytes = npt.NDArray[np.uint8]

_log = logging.getLogger(__name__)

_HEADER_BYTES: Final = 4096
_SPARE_BYTES: Final = 64  # loops read whole vectors, behind the last number too
_HASH_BYTES: Final = 16
_SUM_BYTES: Final = 8
_TOGETHER: Final = 8
"""Tokens of a page that is not whole are recorded by so many; one at a time would cost small models some percent."""
_ERASED_AT_ONCE: Final = 16
"""Pages; 60 MB at 7B, which takes some ten milliseconds."""
_RECORD: Final = np.dtype(
    [
        ("written", np.uint32),  # since it was erased
        ("count", np.uint32),  # of the tokens that are recorded
        ("tokens", np.int32, PAGE),
        ("hash", np.uint8, _HASH_BYTES),  # of these tokens and those before them, and of whose they are
        ("before", np.uint8, _HASH_BYTES),
        ("checksum", np.uint8, _HASH_BYTES),  # of keys and values of a whole page
        ("sums", np.uint8, (PAGE, _SUM_BYTES)),  # of those of each token, of other pages
        ("owner", np.uint8, 64),  # UTF-8, filled up with zeros
        ("used_at", np.float64),  # seconds since the epoch
    ]
)
_FIRST: Final = bytes(_HASH_BYTES)


@dataclass(frozen=True, slots=True)
class KeptPages:
    """Tokens that an earlier process computed, with their pages, and the device that they belong to."""

    owner: str
    tokens: "array[int]"
    pages: list[int]
    age_s: float  # since they were used


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

    def forget(self, page: int, kept: int = 0) -> None:
        record = self._records[page]
        count = int(record["count"])
        if kept < count < PAGE and kept:
            record["count"] = kept
            record["hash"] = _hash(record["before"].tobytes(), record, kept)
        elif kept < count:  # a whole page has no checksum of its beginning
            self._records[page] = np.zeros(1, _RECORD)[0]
        record["written"] = 1

    def record(self, page: int, tokens: Sequence[int], before: int | None, owner: str) -> None:
        """Record the tokens of a page whose keys and values are computed; `before` is the sequence's page before it."""
        record = self._records[page]
        if before is not None and self._records[before]["count"] != PAGE:
            return
        begin, end = int(record["count"]), len(tokens) // _TOGETHER * _TOGETHER
        if end <= begin:
            return
        if end == PAGE:
            record["checksum"] = self._sum(page)
        else:
            record["sums"][begin:end] = self._token_sums(page, begin, end)
        previous = _FIRST if before is None else self._records[before]["hash"].tobytes()
        record["tokens"][:end] = tokens[:end]
        record["before"] = np.frombuffer(previous, np.uint8)
        record["owner"] = np.frombuffer(owner.encode()[:64].ljust(64, b"\0"), np.uint8)
        record["hash"] = _hash(previous, record, end)
        record["used_at"] = time.time()
        record["count"] = end

    def note_use(self, pages: Iterable[int]) -> None:
        self._records["used_at"][list(pages)] = time.time()

    def erase(self, pages: Sequence[int]) -> None:
        """Erase some of these pages, which nobody uses; call it again for the others."""
        places = np.array(pages, np.intp)
        for page in places[self._records["written"][places] != 0][:_ERASED_AT_ONCE]:
            self._erase(int(page))

    def _erase(self, page: int) -> None:
        self._records[page]["count"] = 0
        self.keys[page] = self.values[page] = 0
        self._records[page] = np.zeros(1, _RECORD)[0]

    def sequences(self, *, vocabulary: int, keep_s: float, threads: int) -> list[KeptPages]:
        """Return the sequences that can be taken over, the least recently used first; erase all other pages."""
        records = self._records
        now = time.time()
        counts = records["count"]
        fits = (records["tokens"] >= 0).all(1) & (records["tokens"] < vocabulary).all(1)
        places = [int(place) for place in np.nonzero((counts > 0) & (counts <= PAGE) & fits)[0]]
        with ThreadPoolExecutor(threads) as pool:
            good = [place for place, is_good in zip(places, pool.map(self._is_good, places), strict=True) if is_good]
            recent = {place for place in good if now - records[place]["used_at"] < keep_s}
            chains = _chains({records[place]["hash"].tobytes(): place for place in reversed(good)}, records, recent)
            taken = {page for chain in chains for page in chain}
            list(pool.map(self._erase, (int(page) for page in np.nonzero(records["written"])[0] if page not in taken)))
        found = [
            KeptPages(
                bytes(records[chain[-1]]["owner"]).rstrip(b"\0").decode(errors="replace"),
                array("i", records["tokens"][chain].reshape(-1)[: int(counts[chain].sum())].tobytes()),
                chain,
                max(0.0, now - float(records[chain[-1]]["used_at"])),
            )
            for chain in chains
        ]
        return sorted(found, key=lambda each: -each.age_s)

    def _is_good(self, place: int) -> bool:
        record = self._records[place]
        count = int(record["count"])
        if not np.array_equal(record["hash"], _hash(record["before"].tobytes(), record, count)):
            return False
        if count == PAGE:
            return np.array_equal(record["checksum"], self._sum(place))
        return np.array_equal(record["sums"][:count], self._token_sums(place, 0, count))

    def _sum(self, page: int) -> Bytes:
        found = bytes.fromhex(checksum(self.keys[page]) + checksum(self.values[page]))
        return np.frombuffer(found, np.uint8)[:_HASH_BYTES]

    def _token_sums(self, page: int, begin: int, end: int) -> Bytes:
        keys, values = self.keys[page][..., begin:end], self.values[page][:, :, begin:end]
        both = np.empty((end - begin, 2, *keys.shape[:-1]), np.uint16)
        both[:, 0], both[:, 1] = np.moveaxis(keys, -1, 0), np.moveaxis(values, 2, 0)
        found = b"".join(bytes.fromhex(checksum(each))[:_SUM_BYTES] for each in both)
        return np.frombuffer(found, np.uint8).reshape(-1, _SUM_BYTES)


def _hash(before: bytes, record: Any, count: int) -> Bytes:
    content = before + record["owner"].tobytes() + record["tokens"][:count].tobytes()
    return np.frombuffer(hashlib.sha256(content).digest(), np.uint8)[:_HASH_BYTES]


def _chains(places: dict[bytes, int], records: Any, recent: Container[int]) -> list[list[int]]:
    """Return the longest sequences of pages, each from a first page to a recent one that no other one follows."""
    followed = {records[place]["before"].tobytes() for place in places.values()}
    chains = dict[int, list[int]]()
    for own, last in places.items():
        if own in followed:
            continue
        chain, before = [last], records[last]["before"].tobytes()
        while before != _FIRST and (place := places.get(before)) is not None:
            chain.append(place)
            before = records[place]["before"].tobytes()
        used = list(dropwhile(lambda page: page not in recent, chain))
        if before == _FIRST and used:
            chains[used[0]] = used[::-1]
    inner = {page for chain in chains.values() for page in chain[:-1]}
    return [chain for last, chain in chains.items() if last not in inner]


def _rounded(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _check_room(descriptor: int, needed: int) -> None:
    """Check that a file can grow to hold all pages; raises OSError."""
    file, system = os.fstat(descriptor), os.fstatvfs(descriptor)
    free = system.f_bavail * system.f_frsize + 512 * file.st_blocks
    if free < needed:
        raise OSError(f"{needed} bytes are needed and {free} are free")
