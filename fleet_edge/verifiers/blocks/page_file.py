"""Keys and values in a file, from which a restarted edge takes what is undamaged.

    header    what the pages are of: layout, target, shape; written last, so that a file without it is void
    records   one for each page: its tokens, the page before it, whose it is, and checksums
    keys      as `Pages` has them, those of each pool, then
    values    likewise

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
from fleet_edge.verifiers.blocks.geometry import Pool
from fleet_edge.verifiers.blocks.kv import PAGE, Floats, Halves, page_bytes, shapes, state_bytes

Bytes = npt.NDArray[np.uint8]

_log = logging.getLogger(__name__)

LAYOUT: Final = 2
"""Version of what the file holds: raise it where the same tokens have other bits or another place, also far from the
beginning of a sequence. Pages of the same target survive every other change of code."""

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
_STATE_RECORD: Final = np.dtype(
    [
        ("written", np.uint32),  # since it was erased
        ("is_whole", np.uint32),
        ("hash", np.uint8, _HASH_BYTES),  # that of the page whose last token it is behind
        ("checksum", np.uint8, _HASH_BYTES),
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
    states: dict[int, int]  # of recurrent layers, by the number of tokens before them


class PageFile:
    """`PageMemory` in a file, which one process uses at a time."""

    def __init__(
        self, path: Path, identity: str, pools: Sequence[Pool], count: int, states: Sequence[Sequence[int]] = ()
    ) -> None:
        """Open or make the file, and lock it; `identity` is that of the target, `states` as in `ProcessMemory`.

        Raises OSError if that is not possible, another process has it, or there is no room for all pages.
        """
        self.count, self.path = count, path
        self._records_at = _HEADER_BYTES
        of_states = self._records_at + count * _RECORD.itemsize
        state_count = states[0][0] if states else 0
        end = _rounded(of_states + state_count * _STATE_RECORD.itemsize)
        self._parts: list[tuple[int, int]] = []  # where it begins, and the bytes of a page
        self._state_parts: list[tuple[int, int]] = []  # likewise, of a state
        of_pages = [*(shapes(pool, count)[0] for pool in pools), *(shapes(pool, count)[1] for pool in pools)]
        kinds: list[tuple[list[tuple[int, int]], Any, Sequence[int]]] = [
            (self._parts, np.uint16, its) for its in of_pages
        ]
        kinds += [(self._state_parts, np.float32, its) for its in states]
        for parts, kind, its in kinds:
            size = math.prod(its[1:]) * np.dtype(kind).itemsize
            parts.append((end, size))
            end = _rounded(end + its[0] * size + _SPARE_BYTES)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by forked processes
            shape = hashlib.sha256(repr([tuple(each) for each in (*pools, *states)]).encode()).hexdigest()
            header = f"pages {LAYOUT} {identity} {shape} {count}".encode().ljust(_HEADER_BYTES, b"\0")
            if os.fstat(self._file).st_size != end or os.pread(self._file, _HEADER_BYTES, 0) != header:
                os.ftruncate(self._file, 0)
            _check_room(self._file, count * page_bytes(pools) + state_bytes(states))
            if not os.fstat(self._file).st_size:
                os.ftruncate(self._file, end)
                os.pwrite(self._file, header, 0)
            self._memory = mmap.mmap(self._file, 0)
        except BaseException:
            os.close(self._file)
            raise
        arrays: list[Any] = [
            np.frombuffer(self._memory, kind, math.prod(its), begin).reshape(its)
            for (begin, _), (_, kind, its) in zip((*self._parts, *self._state_parts), kinds, strict=True)
        ]
        self.keys: list[Halves] = arrays[: len(pools)]
        self.values: list[Halves] = arrays[len(pools) : 2 * len(pools)]
        self.states: list[Floats] = arrays[2 * len(pools) :]
        self._records: Any = np.frombuffer(self._memory, _RECORD, count, self._records_at)
        self._state_records: Any = np.frombuffer(self._memory, _STATE_RECORD, state_count, of_states)

    @property
    def is_deleted(self) -> bool:
        """True once somebody has deleted the file: its pages must be forgotten."""
        return os.fstat(self._file).st_nlink == 0

    def provide(self, page: int) -> None:
        # A page without room in the file would end the process when it is written to.
        self._provide(self._parts, page)

    def provide_state(self, state: int) -> None:
        self._provide(self._state_parts, state)

    def _provide(self, parts: Iterable[tuple[int, int]], number: int) -> None:
        for begin, size in parts:
            os.posix_fallocate(self._file, begin + number * size, size + _SPARE_BYTES)

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

    def forget_state(self, state: int) -> None:
        self._state_records[state]["is_whole"], self._state_records[state]["written"] = 0, 1

    def record_state(self, state: int, page: int) -> None:
        record = self._state_records[state]
        if record["is_whole"] or self._records[page]["count"] != PAGE:
            return
        record["hash"], record["checksum"] = self._records[page]["hash"], self._state_sum(state)
        record["is_whole"] = 1

    def note_use(self, pages: Iterable[int]) -> None:
        self._records["used_at"][list(pages)] = time.time()

    def erase(self, pages: Sequence[int], states: Sequence[int] = ()) -> None:
        """Erase some of these pages and states, which nobody uses; call it again for the others."""
        for numbers, records, erase in (
            (pages, self._records, self._erase),
            (states, self._state_records, self._erase_state),
        ):
            places = np.array(numbers, np.intp)
            for number in places[records["written"][places] != 0][:_ERASED_AT_ONCE]:
                erase(int(number))

    def _erase(self, page: int) -> None:
        self._records[page]["count"] = 0
        for its in (*self.keys, *self.values):
            its[page] = 0
        self._records[page] = np.zeros(1, _RECORD)[0]

    def _erase_state(self, state: int) -> None:
        for its in self.states:
            its[state] = 0
        self._state_records[state] = np.zeros(1, _STATE_RECORD)[0]

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
            states = self._states_of(taken, pool)
        found = [
            KeptPages(
                bytes(records[chain[-1]]["owner"]).rstrip(b"\0").decode(errors="replace"),
                array("i", records["tokens"][chain].reshape(-1)[: int(counts[chain].sum())].tobytes()),
                chain,
                max(0.0, now - float(records[chain[-1]]["used_at"])),
                {(place + 1) * PAGE: states[page] for place, page in enumerate(chain) if page in states},
            )
            for chain in chains
        ]
        return sorted(found, key=lambda each: -each.age_s)

    def _states_of(self, pages: Iterable[int], pool: ThreadPoolExecutor) -> dict[int, int]:
        """Return the undamaged states behind whole pages, by page; erase all others."""
        records, found = self._state_records, dict[int, int]()
        whole = {self._records[page]["hash"].tobytes(): page for page in pages if self._records[page]["count"] == PAGE}
        places = [int(place) for place in np.nonzero(records["is_whole"])[0]]
        for place, total in zip(places, pool.map(self._state_sum, places), strict=True):
            page = whole.get(records[place]["hash"].tobytes())
            if page is not None and np.array_equal(records[place]["checksum"], total):
                found[page] = place
        others = {int(place) for place in np.nonzero(records["written"])[0]} - set(found.values())
        list(pool.map(self._erase_state, others))
        return found

    def _is_good(self, place: int) -> bool:
        record = self._records[place]
        count = int(record["count"])
        if not np.array_equal(record["hash"], _hash(record["before"].tobytes(), record, count)):
            return False
        if count == PAGE:
            return np.array_equal(record["checksum"], self._sum(place))
        return np.array_equal(record["sums"][:count], self._token_sums(place, 0, count))

    def _sum(self, page: int) -> Bytes:
        return _sum([its[page] for its in (*self.keys, *self.values)])

    def _state_sum(self, state: int) -> Bytes:
        return _sum([its[state] for its in self.states])

    def _token_sums(self, page: int, begin: int, end: int) -> Bytes:
        parts = [np.moveaxis(its[page][..., begin:end], -1, 0) for its in self.keys]
        parts += [np.moveaxis(its[page][:, :, begin:end], 2, 0) for its in self.values]
        both = np.concatenate([its.reshape(end - begin, -1) for its in parts], axis=1)
        found = b"".join(bytes.fromhex(checksum(each))[:_SUM_BYTES] for each in both)
        return np.frombuffer(found, np.uint8).reshape(-1, _SUM_BYTES)


def _sum(arrays: Iterable[npt.NDArray[Any]]) -> Bytes:
    found = b"".join(bytes.fromhex(checksum(each)) for each in arrays)
    return np.frombuffer(hashlib.sha256(found).digest(), np.uint8)[:_HASH_BYTES]


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
