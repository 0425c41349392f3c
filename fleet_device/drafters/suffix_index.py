"""Suffix index: where in earlier tokens the same ones occurred as at the end of a sequence; and the history.

A place is the number of the token that followed. Each is chained under a hash of its last 2, 4 and 8 tokens, so that a
search looks at a bounded number of places. What was appended last can be taken back, exactly. (A
suffix tree, as in SuffixDecoding, arXiv 2411.04975, finds the same places in several times the memory.)
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Final

import numpy as np
from numpy.typing import NDArray

LENGTHS: Final = (2, 4, 8)
"""Numbers of tokens that are hashed together. A single token occurs nearly everywhere."""

LONGEST: Final = 16
"""Most tokens that are compared; a longer match says no more."""

_LOOKED_AT: Final = 16
"""Places of a chain that are compared, the latest first."""

_FIRST_ROOM: Final = 256
"""First capacity in tokens."""

_FEW: Final = 8
"""Number of places up to which they are chained one by one, because that is faster."""

TOKEN_BYTES: Final = 4 + 2 * 4 * len(LENGTHS)
"""Memory of a token."""

_NONE: Final = -1
_WORD: Final = (1 << 64) - 1

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Match:
    """What followed earlier occurrences of a sequence's end: at least one token, the latest place first.

    `alike` has for each the number of matching tokens before it, at most `longest`.
    """

    followers: list[int]
    alike: list[int]


class SuffixIndex:
    """A token sequence that can be searched. Not for use from several threads at once.

    `longest` tokens are compared, at least the last of `LENGTHS`. `capacity` is allocated at once; None grows.
    """

    def __init__(self, *, longest: int = LONGEST, capacity: int | None = None) -> None:
        self._longest = longest
        random = np.random.default_rng(20241104)
        self._weights = random.integers(1 << 62, size=LENGTHS[-1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._plain_weights = self._weights.tolist()
        self._length = 0
        self._make_room(capacity or _FIRST_ROOM)

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> Ints:
        """The sequence, int32 `[length]`; valid until the next change."""
        return self._tokens[: self._length]

    @property
    def room(self) -> int:
        return len(self._tokens) - self._length

    def clear(self) -> None:
        self._length = 0
        for latest in self._latest:
            latest.fill(_NONE)

    def append(self, tokens: Sequence[int] | Ints) -> None:
        """Append tokens; ids below 0 separate texts, and no match crosses them."""
        if len(tokens) == 0:
            return
        needed = self._length + len(tokens)
        if needed > len(self._tokens):
            before = self.tokens
            self._make_room(max(needed, 2 * len(self._tokens)))
            self._tokens[: self._length] = before
            self._link(0, self._length)
        self._tokens[self._length : needed] = tokens
        first, self._length = self._length, needed
        self._link(first, needed)

    def truncate(self, length: int) -> None:
        length = max(length, 0)
        if length >= self._length:
            return
        self._unlink(length, self._length)
        self._length = length

    def find(self, end: Sequence[int] | Ints) -> Match | None:
        """Return the tokens after the places that match the end of a sequence best (its last `longest` tokens)."""
        tail = [int(token) for token in end[-self._longest :]]
        whole = np.array(tail, dtype=np.int32).tobytes() if len(tail) == self._longest else None
        tail.reverse()
        slots = self._slots_of(tail)
        for number in range(len(slots) - 1, -1, -1):
            found = self._alike(number, slots[number], tail, whole)
            if found:
                return Match([self._view[place] for place, _ in found], [alike for _, alike in found])
        return None

    def _alike(self, number: int, slot: int, tail: Sequence[int], whole: bytes | None) -> list[tuple[int, int]]:
        """Return places of a chain that match at least as far as its hash, each with the length of the match.

        `tail` has the tokens before a place, the last first; `whole` is their memory, if they are `longest`: a fast
        comparison for repetitive texts.
        """
        size, tokens, before = LENGTHS[number], self._view, self._befores[number]
        last, first, found = tail[0], tail[size - 1], []
        place = self._latests[number][slot]
        for _ in range(_LOOKED_AT):
            if place < 0:
                break
            # Other tokens may have the same hash; comparing two of them excludes most.
            if tokens[place - 1] == last and tokens[place - size] == first and tokens[place] >= 0:
                alike, most = 1, min(place, len(tail))
                if whole is not None and self._bytes[4 * (place - most) : 4 * place] == whole:
                    alike = most
                while alike < most and tokens[place - 1 - alike] == tail[alike]:
                    alike += 1
                if alike >= size:
                    found.append((place, alike))
            place = before[place]
        return found

    def _make_room(self, capacity: int) -> None:
        self._tokens: Ints = np.zeros(capacity, dtype=np.int32)
        self._before = [np.full(capacity, _NONE, dtype=np.int32) for _ in LENGTHS]
        self._bits = max(4, (capacity - 1).bit_length() - 1)  # half as many hashes as tokens, to as many
        self._latest = [np.full(1 << self._bits, _NONE, dtype=np.int32) for _ in LENGTHS]
        # The same memory, with faster access to single numbers.
        self._view: memoryview[int] = self._tokens.data
        self._bytes = self._view.cast("B")
        self._befores: list[memoryview[int]] = [each.data for each in self._before]
        self._latests: list[memoryview[int]] = [each.data for each in self._latest]

    def _link(self, first: int, last: int) -> None:
        if last - first <= _FEW:
            for place in range(first, last):
                for number, slot in enumerate(self._slots_of(self._tail(place))):
                    self._befores[number][place] = self._latests[number][slot]
                    self._latests[number][slot] = place
            return
        for number, size in enumerate(LENGTHS):
            begin = max(first, size)
            if begin >= last:
                continue
            latest, before = self._latest[number], self._before[number]
            slots, places = self._slots(number, begin, last), np.arange(begin, last, dtype=np.int32)
            order = np.argsort(slots, kind="stable")
            slots, places = slots[order], places[order]
            follows = slots[1:] == slots[:-1]
            previous = latest[slots]
            previous[1:][follows] = places[:-1][follows]
            before[places] = previous
            latest[slots] = places  # assigned in order: the latest comes last

    def _unlink(self, first: int, last: int) -> None:
        if last - first <= _FEW:
            for place in range(last - 1, first - 1, -1):
                for number, slot in enumerate(self._slots_of(self._tail(place))):
                    self._latests[number][slot] = self._befores[number][place]
            return
        for number, size in enumerate(LENGTHS):
            begin = max(first, size)
            if begin < last:
                slots, latest, before = self._slots(number, begin, last), self._latest[number], self._before[number]
                # Of the removed places with one hash, the earliest knows the latest one before it.
                latest[slots[::-1]] = before[begin:last][::-1]  # assigned in order: that comes last

    def _tail(self, place: int) -> list[int]:
        tail = self._view[max(0, place - LENGTHS[-1]) : place].tolist()
        tail.reverse()
        return tail

    def _slots_of(self, tail: Sequence[int]) -> list[int]:
        """Return the hashes of the last tokens (the last first), for as many lengths as there are tokens."""
        products = [*accumulate(map(mul, tail, self._plain_weights))]
        shift = 64 - self._bits
        return [(products[size - 1] & _WORD) >> shift for size in LENGTHS if size <= len(products)]

    def _slots(self, number: int, first: int, last: int) -> NDArray[np.int64]:
        """Return the hashes of the `LENGTHS[number]` tokens before each place from `first` to `last`, excluded."""
        size = LENGTHS[number]
        windows = np.lib.stride_tricks.sliding_window_view(self._tokens[first - size : last - 1], size)
        products = windows[:, ::-1].astype(np.int64).view(np.uint64) * self._weights[:size]
        mixed = products.sum(axis=1, dtype=np.uint64)
        hashes: NDArray[np.int64] = (mixed >> np.uint64(64 - self._bits)).astype(np.int64)
        return hashes


_BETWEEN: Final = (-1,)

_PROMPT_TOKENS: Final = 8
"""Tokens of a prompt's end that are kept, so that the first tokens of its output are found. No others are kept."""

_SHORTEST: Final = 2
"""Tokens; a shorter text is not worth its place."""


HISTORY_BYTES: Final = 8_000_000
"""Memory of a device's history: about 280,000 tokens."""


class History:
    """Earlier generations of this process. Several threads may use it."""

    def __init__(self, *, memory_bytes: int = HISTORY_BYTES) -> None:
        self._capacity = max(64, memory_bytes // TOKEN_BYTES)
        self._index = SuffixIndex(capacity=self._capacity)
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        return len(self._index)

    def remember(self, prompt: Sequence[int], text: Sequence[int]) -> None:
        """Add a generation, behind the last tokens of its prompt."""
        if len(text) < _SHORTEST:
            return
        new = np.asarray([*prompt[-_PROMPT_TOKENS:], *text, *_BETWEEN], dtype=np.int32)[-self._capacity :]
        with self._lock:
            if len(new) > self._index.room:
                # The older half goes, so that this is done rarely.
                keep = max(0, min(self._capacity // 2, self._capacity - len(new)))
                old = self._index.tokens[len(self._index) - min(keep, len(self._index)) :]
                new = np.concatenate([old, new])
                self._index.clear()
            self._index.append(new)

    def find(self, end: Sequence[int] | Ints) -> Match | None:
        with self._lock:
            return self._index.find(end)
