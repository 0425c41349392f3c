"""Prefix cache: a verifier that retains ended sequences' keys and values for sequences with the same beginning.

It wraps any verifier and is one itself. A closed sequence stays in memory until its room is needed; the least recently
used goes first, before any open one; a prefix that several devices have used goes late, and one of `WARM` last. A
sequence whose next tokens are known (`expect`) reuses what another has computed (`reuse`), by taking over an ended
sequence or forking. `ahead` names a sequence that is about to compute the same, so that only one of many computes it.
"""

import secrets
import threading
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Final, TypeVar

from fleet_edge.settings import PrefixSharing
from fleet_edge.verifiers.contract import (
    CapacityExceeded,
    DraftsItself,
    HasStates,
    Item,
    KeepsPrefixes,
    Logits,
    RunsElsewhere,
    SequenceFailed,
    SharesPrefixes,
    TargetInfo,
    Verifier,
    VerifierError,
)

_SIZE: Final = array("i").itemsize


def pack(tokens: Sequence[int]) -> bytes:
    """Return token ids, each below 2^31, as `PrefixIndex` takes them."""
    return array("i", tokens).tobytes()


def shared_tokens(left: bytes, right: bytes) -> int:
    """Return the length of the common prefix, in tokens."""
    most = min(len(left), len(right)) // _SIZE
    if left.startswith(right[: most * _SIZE]):
        return most
    # Binary search: prefixes of `least` tokens agree, those of `most` do not.
    least = 0
    while most - least > 1:
        middle = (least + most) // 2
        if left.startswith(right[: middle * _SIZE]):
            least = middle
        else:
            most = middle
    return least


class PrefixIndex:
    """Keys with token sequences (see `pack`), sorted, so that neighbours share most: finds the longest common prefixes.

    A lookup costs a binary search; then the stored numbers of shared tokens save all further comparisons.
    """

    def __init__(self) -> None:
        self._tokens: dict[int, bytes] = {}
        self._entries: list[tuple[bytes, int]] = []  # ascending: tokens, key
        self._shared: list[int] = []  # tokens that each entry shares with the one before it

    def insert(self, key: int, tokens: bytes) -> None:
        self.remove(key)
        self._tokens[key] = tokens
        at = bisect_left(self._entries, (tokens, key))
        self._entries.insert(at, (tokens, key))
        self._shared.insert(at, shared_tokens(self._entries[at - 1][0], tokens) if at else 0)
        if at + 1 < len(self._entries):
            self._shared[at + 1] = shared_tokens(tokens, self._entries[at + 1][0])

    def remove(self, key: int) -> None:
        tokens = self._tokens.pop(key, None)
        if tokens is not None:
            at = bisect_left(self._entries, (tokens, key))
            del self._entries[at]
            shared = self._shared.pop(at)
            if at < len(self._entries):
                self._shared[at] = min(shared, self._shared[at])

    def matches(self, tokens: bytes) -> Iterator[tuple[int, int]]:
        """Yield the common prefix length of each key's sequence with the given one, and the key; longest first.

        Every key comes once, those without a common prefix with 0. The index MUST NOT change meanwhile.
        """
        entries = self._entries
        after = bisect_left(entries, (tokens,))
        before = after - 1
        # Away from the place of the sequence, on either side, common prefixes only become shorter.
        longer = shared_tokens(tokens, entries[after][0]) if after < len(entries) else -1
        shorter = shared_tokens(tokens, entries[before][0]) if after else -1
        while max(longer, shorter) >= 0:
            if longer >= shorter:
                yield longer, entries[after][1]
                after += 1
                longer = min(longer, self._shared[after]) if after < len(entries) else -1
            else:
                yield shorter, entries[before][1]
                shorter = min(shorter, self._shared[before]) if before else -1
                before -= 1


@dataclass(slots=True, eq=False)
class HeldSequence:
    """A sequence whose keys and values a verifier holds.

    `key` is its key at the verifier, `caller` that of the caller or None once ended. `expected` are the packed tokens
    that it computes first. `stable`: all of it was computed with `Item.stable`. `reached` is the number of tokens that
    it had before evictions. `shared` is the length of the prefix that another owner has used too. `used_at`: when it
    ended, or another one like it.
    """

    key: int
    caller: int | None
    owner: str = ""
    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    expected: bytes = b""
    stable: bool = True
    reached: int = 0
    shared: int = 0
    used_at: float = 0.0

    @property
    def computed(self) -> int:
        return len(self.tokens)

    def begins_as(self, tokens: bytes, length: int) -> bool:
        return self.tokens[:length].tobytes() == tokens[: length * self.tokens.itemsize]


WARM: Final = "*"
"""Owner of what was computed ahead, which all may reuse; no device has this name."""

LEAST_REUSED: Final = 16
"""Fewest tokens to reuse: computing fewer costs about as much as copying them."""

TAIL: Final = 64
"""Most tokens lost if an ended sequence is taken over instead of copied."""

_LOOKED_AT: Final = 256
"""Sequences considered per lookup, so that its cost is bounded."""

_KEEP_S: Final = 86_400.0
"""Age at which ended sequences are dropped, and erased where they are kept: a conversation goes on within a day."""

_MOST_RETAINED: Final = 4096
_FIRST_OF_OURS: Final = 1 << 32
"""First of the keys that the cache chooses itself, apart from those of callers."""

T = TypeVar("T")


class PrefixCache:
    """`Verifier` over another, which nobody else may call.

    `sharing` says whose prefixes may be reused; with `off` nothing is retained. `share` returns an owner's share of
    memory before its sequences go first. `clock` is monotonic.
    """

    def __init__(
        self,
        verifier: Verifier,
        *,
        sharing: PrefixSharing = PrefixSharing.ALL,
        share: Callable[[str], float] = lambda _owner: 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._verifier = verifier
        self._sharing = sharing
        self._index = PrefixIndex()  # open sequences with what they expect, retained ones with what they have computed
        self._open: dict[int, HeldSequence] = {}  # by the caller's key
        self._held: dict[int, HeldSequence] = {}  # by the key below: open and retained ones
        self._share = share
        self._clock = clock
        self._retained: dict[int, HeldSequence] = {}  # ended ones, by the key below, the least recently used first
        self._owned = Counter[str]()  # tokens of the retained ones
        self._dropping = threading.Lock()  # a step may drop retained ones on its thread
        self._was_deleted = False
        self.on_deletion: Callable[[], None] = lambda: None  # what was computed ahead is gone
        self._keys = count(_FIRST_OF_OURS)
        info = verifier.info
        self._all_stable = info.batch_invariant and info.min_step_tokens == 1
        if isinstance(verifier, KeepsPrefixes):
            for kept in verifier.restore(self._keys, keep_s=_KEEP_S):
                held = self._held[kept.key] = HeldSequence(kept.key, None, kept.owner, kept.tokens)
                self._retain(held)
                held.used_at -= kept.age_s

    @property
    def info(self) -> TargetInfo:
        return self._verifier.info

    @property
    def retained_tokens(self) -> int:
        return self._owned.total()

    def open(self, sequence: int) -> None:
        self._follow_deletion()
        self._require_new(sequence)
        held = HeldSequence(self._key(sequence), sequence)
        self._with_room(lambda: self._verifier.open(held.key))
        self._register(held)

    def fork(self, sequence: int, source: int, length: int) -> None:
        origin = self._of(source)
        self._require_new(sequence)
        self._register(self._fork(self._key(sequence), sequence, origin, length))

    def computed(self, sequence: int) -> int:
        return self._of(sequence).computed

    def score(self, items: Sequence[Item]) -> Logits:
        below = self._below(items)
        try:
            logits = self._score(below)
        except CapacityExceeded:
            with self._dropping:
                fits = bool(self._retained) and self._fits(below)
            if not fits:
                raise
            logits = self._score(below)
        for item, own in zip(items, below, strict=True):
            held = self._held[own.sequence]
            held.tokens.extend(item.tokens)
            held.stable &= item.stable or self._all_stable
        return logits

    def truncate(self, sequence: int, length: int) -> None:
        held = self._of(sequence)
        self._verifier.truncate(held.key, length)
        del held.tokens[length:]
        held.shared = min(held.shared, length)

    def close(self, sequence: int) -> None:
        held = self._open.pop(sequence, None)
        if held is None:
            return
        held.caller = None
        self._index.remove(held.key)
        if self._worth_keeping(held):
            self._retain(held)
        else:
            self._drop(held)

    def fits(self, items: Sequence[Item]) -> bool:
        """Make room for a step by dropping retained sequences; False if it still does not fit."""
        return self._fits(self._below(items))

    def capacity(self) -> int:
        return self._verifier.capacity()

    # As `RunsElsewhere`, which the wrapped verifier may be

    def away(self) -> str:
        return self._verifier.away() if isinstance(self._verifier, RunsElsewhere) else ""

    def shut_down(self) -> None:
        if isinstance(self._verifier, RunsElsewhere):
            self._verifier.shut_down()

    # Beyond the contract

    def propose(self, tokens: Mapping[int, Sequence[int]]) -> Logits:
        """As `DraftsItself`, which the wrapped verifier MUST be."""
        assert isinstance(self._verifier, DraftsItself)
        return self._verifier.propose({self._of(sequence).key: its for sequence, its in tokens.items()})

    def expect(self, sequence: int, tokens: Sequence[int], *, owner: str = "", stable: bool = True) -> None:
        """Announce the tokens that an open sequence will compute first, and whether as `Item.stable`."""
        held = self._of(sequence)
        held.owner, held.stable = owner, stable or self._all_stable
        if self._sharing is not PrefixSharing.OFF:
            held.expected = pack(tokens)
            self._index.insert(held.key, held.expected)
        self._note_owner(held)

    def reuse(self, sequence: int) -> int:
        """Reuse what another sequence has computed of the expected tokens, except the last one.

        Returns the number of computed tokens gained, without those that an eviction has taken from the sequence before.
        """
        held = self._of(sequence)
        length, source = self._longest(held)
        gained = length - held.computed
        if source is None or gained < LEAST_REUSED:
            return 0
        try:
            theirs = source.owner != held.owner
            found = self._move_or_fork(source, length, taker=held)
        except CapacityExceeded:
            return 0
        found.owner, found.expected, found.stable = held.owner, held.expected, held.stable
        found.reached = held.reached
        found.shared = length if theirs else min(source.shared, length)
        source.shared = max(source.shared, found.shared)
        self._note_owner(found)
        self._drop(held)
        self._register(found)
        self._index.insert(found.key, found.expected)
        return max(0, length - max(held.computed, held.reached))

    def reusable(self, sequence: int) -> int:
        """Return how many tokens of a sequence are computed, or can be reused; callable during a step."""
        held = self._open.get(sequence)
        if held is None:
            return 0
        with self._dropping:
            return max(held.computed, self._longest(held)[0])

    def known(self, tokens: Sequence[int], *, owner: str, stable: bool) -> int:
        """Return how many tokens a sequence that is to be opened could reuse now; callable during a step."""
        if self._sharing is PrefixSharing.OFF:
            return 0
        with self._dropping:
            return self._longest(HeldSequence(-1, None, owner, expected=pack(tokens), stable=stable))[0]

    def ahead(self, sequence: int, *, computing: Container[int], able: Container[int] = ()) -> tuple[int, int] | None:
        """Return an open sequence that is about to compute what this one needs, and the length of their common prefix.

        Considers sequences `computing` in the next step or `able` to join it. None if none will compute more than can
        be reused now.
        """
        held = self._of(sequence)
        available = held.computed
        first: tuple[int, int, int] | None = None
        for common, other in self._alike(held.expected, held):
            if common < held.computed + LEAST_REUSED:
                break
            available = max(available, min(common, other.computed))
            if other.caller is None or other.computed >= common:
                continue
            if other.caller in computing or (other.caller in able and other.computed > held.computed):
                first = max(first or (-1, 0, 0), (other.computed, common, other.caller))
        if first is None or first[1] < available + LEAST_REUSED:
            return None
        return first[2], first[1]

    def evict(self, sequence: int) -> None:
        """Free the memory of an open sequence, which goes on with nothing computed."""
        held = self._of(sequence)
        self._verifier.close(held.key)
        self._verifier.open(held.key)
        held.reached = max(held.reached, held.computed)
        self._note_owner(held)
        del held.tokens[:]

    def expire(self) -> None:
        """Drop ended sequences that are too old, and erase what they leave. Call it every few seconds."""
        self._follow_deletion()
        last = self._clock() - _KEEP_S
        for held in [each for each in self._retained.values() if each.used_at < last and each.owner != WARM]:
            self._drop(held)
        if isinstance(self._verifier, KeepsPrefixes):
            self._verifier.erase_free()

    def clear(self) -> None:
        for held in list(self._retained.values()):
            self._drop(held)

    def _follow_deletion(self) -> None:
        """Drop ended sequences, and once the prompts computed ahead, if an administrator has deleted the file."""
        if not isinstance(self._verifier, KeepsPrefixes) or not self._verifier.is_forgotten:
            return
        if not self._was_deleted:
            self._was_deleted = True
            self.clear()
            self.on_deletion()
        for held in [each for each in self._retained.values() if each.owner != WARM]:
            self._drop(held)

    # Lookups

    def _alike(self, tokens: bytes, but: HeldSequence) -> Iterator[tuple[int, HeldSequence]]:
        """Yield other sequences that `but` may reuse, with the length of their common prefix, longest first."""
        for common, key in islice(self._index.matches(tokens), _LOOKED_AT):
            other = self._held[key]
            if other is not but and other.stable >= but.stable and self._is_one(other, but):
                yield common, other

    def _is_one(self, source: HeldSequence, taker: HeldSequence) -> bool:
        """Only sequences of one owner share, unless all do; what was computed ahead is for all."""
        return self._sharing is PrefixSharing.ALL or source.owner in (taker.owner, WARM)

    def _note_owner(self, held: HeldSequence) -> None:
        if isinstance(self._verifier, SharesPrefixes):
            self._verifier.isolate(held.key, self._namespace(held.owner))
        if isinstance(self._verifier, KeepsPrefixes):
            self._verifier.own(held.key, held.owner)

    def _namespace(self, owner: str) -> str:
        match self._sharing:
            case PrefixSharing.ALL:
                return ""
            case PrefixSharing.DEVICE:
                return f"device {owner}"
            case PrefixSharing.OFF:
                return f"session {secrets.token_hex(16)}"

    def _longest(self, held: HeldSequence) -> tuple[int, HeldSequence | None]:
        """Return the largest number of expected tokens, except the last, that another has computed, and which."""
        best, found = 0, None
        most = len(held.expected) // held.tokens.itemsize - 1
        for common, other in self._alike(held.expected, held):
            if min(common, most) <= best:
                break
            length = min(common, other.computed, most)
            if isinstance(self._verifier, HasStates):
                length = self._verifier.reach(other.key, length)
            # An open sequence is in the index with what it expects, not with what it has computed.
            if length > best and other.begins_as(held.expected, length):
                best, found = length, other
        return best, found

    def _worth_keeping(self, held: HeldSequence) -> bool:
        if self._sharing is PrefixSharing.OFF or held.computed < LEAST_REUSED:
            return False
        if held.owner == WARM:
            return True
        tokens = held.tokens.tobytes()
        for common, other in self._alike(tokens, held):
            if common < held.computed:
                break
            if other.begins_as(tokens, held.computed):
                self._used(other)
                if other.computed == held.computed:
                    other.used_at = self._clock()
                return False
        return True

    # Held sequences

    def _register(self, held: HeldSequence) -> None:
        assert held.caller is not None
        self._open[held.caller] = held
        self._held[held.key] = held

    def _retain(self, held: HeldSequence) -> None:
        tokens = held.tokens.tobytes()
        for common, key in list(islice(self._index.matches(tokens), _LOOKED_AT)):
            other = self._held[key]
            serves = self._is_one(held, other) and held.stable >= other.stable
            if (
                key in self._retained
                and other.computed == common
                and serves
                and (other.owner != WARM or held.owner == WARM)
            ):
                self._drop(other)  # the new one serves its purpose
        if len(self._retained) >= _MOST_RETAINED:
            self._drop_one()
        self._index.insert(held.key, tokens)
        self._retained[held.key] = held
        held.used_at = self._clock()
        self._owned[held.owner] += held.computed

    def _used(self, held: HeldSequence) -> None:
        if held.key in self._retained:
            self._retained[held.key] = self._retained.pop(held.key)

    def _release(self, held: HeldSequence) -> None:
        """Remove a sequence from the index and the retained ones; its tokens MUST be unchanged since `_retain`."""
        self._index.remove(held.key)
        if self._retained.pop(held.key, None) is not None:
            self._owned[held.owner] -= held.computed
            if not self._owned[held.owner]:
                del self._owned[held.owner]

    def _move_or_fork(self, source: HeldSequence, length: int, *, taker: HeldSequence) -> HeldSequence:
        """Move or fork the first `length` tokens of `source` for `taker`; raises `CapacityExceeded`."""
        caller = taker.caller
        assert caller is not None
        if source.caller is not None:
            return self._fork(next(self._keys), caller, source, length)
        self._used(source)
        if source.owner == WARM:
            return self._fork(next(self._keys), caller, source, length)
        if source.computed - length > TAIL:
            # Otherwise there is room for one of the two, and this one is needed.
            with suppress(CapacityExceeded):
                return self._fork(next(self._keys), caller, source, length)
        self._release(source)
        self._verifier.truncate(source.key, length)
        del source.tokens[length:]
        source.caller = caller
        return source

    def _fork(self, key: int, caller: int, source: HeldSequence, length: int) -> HeldSequence:
        self._with_room(lambda: self._verifier.fork(key, source.key, length), keep=source)
        return HeldSequence(key, caller, tokens=source.tokens[:length], stable=source.stable)

    def _drop(self, held: HeldSequence) -> None:
        self._release(held)
        self._verifier.close(held.key)
        del self._held[held.key]

    def _drop_one(self, *, keep: HeldSequence | None = None) -> bool:
        """Drop the least recently used sequence, or what no other owner has used of it; return whether there was one.

        Those of owners above their share go first.
        """
        whole = sum(held.computed for held in self._held.values()) if self._retained else 0
        owned = [(owner, tokens) for owner, tokens in self._owned.items() if owner != WARM]
        greedy = {owner for owner, tokens in owned if tokens > self._share(owner) * whole}
        candidates = [held for held in self._retained.values() if held is not keep]
        if not candidates:
            return False
        held = next((held for held in candidates if held.owner in greedy), None)
        if held is not None:
            self._drop(held)
            return True
        held = min(candidates, key=lambda held: (held.owner == WARM, held.computed <= held.shared))
        if held.owner != WARM and LEAST_REUSED <= held.shared < held.computed:
            self._cut(held)
        else:
            self._drop(held)
        return True

    def _cut(self, held: HeldSequence) -> None:
        """Keep what other owners have used, unless another sequence has it."""
        used_at = held.used_at
        self._release(held)
        self._verifier.truncate(held.key, held.shared)
        del held.tokens[held.shared :]
        if self._worth_keeping(held):
            self._retain(held)
            held.used_at = used_at
        else:
            self._drop(held)

    # The wrapped verifier

    def _score(self, below: Sequence[Item]) -> Logits:
        try:
            return self._verifier.score(below)
        except SequenceFailed as error:
            caller = self._held[error.sequence].caller
            assert caller is not None
            raise SequenceFailed(str(error), sequence=caller) from error

    def _fits(self, below: Sequence[Item]) -> bool:
        while not self._verifier.fits(below):
            if not self._drop_one():
                return False
        return True

    def _with_room(self, call: Callable[[], T], *, keep: HeldSequence | None = None) -> T:
        """Call; while there is no room, drop a retained sequence and call again."""
        while True:
            try:
                return call()
            except CapacityExceeded:
                if not self._drop_one(keep=keep):
                    raise

    def _below(self, items: Sequence[Item]) -> list[Item]:
        return [
            item if (key := self._of(item.sequence).key) == item.sequence else replace(item, sequence=key)
            for item in items
        ]

    def _of(self, sequence: int) -> HeldSequence:
        try:
            return self._open[sequence]
        except KeyError:
            raise VerifierError(f"Sequence {sequence} is not open.") from None

    def _require_new(self, sequence: int) -> None:
        if sequence in self._open:
            raise VerifierError(f"Sequence {sequence} is open already; close it first.")

    def _key(self, sequence: int) -> int:
        """Return a free key for the wrapped verifier: the caller's own if possible, so that errors name it."""
        return sequence if sequence not in self._held else next(self._keys)
