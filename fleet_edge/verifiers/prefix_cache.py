"""Prefix cache: a verifier whose ended sequences keep their keys and values, for those that begin as they do.

It wraps a verifier of any kind and is one itself. A sequence that is closed stays in memory until its room is needed;
the one unused for longest goes first, before any that is open. A sequence of which it is known what it is going to
compute (`expect`) takes over what another has computed of it (`reuse`): the whole of an ended one that nobody would
miss, else a fork. What another is about to compute is told too (`ahead`): of many that begin alike one computes it.
"""

import secrets
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Final, TypeVar

from fleet_edge.settings import PrefixSharing
from fleet_edge.verifiers.contract import (
    CapacityExceeded,
    Item,
    Logits,
    RunsElsewhere,
    SequenceFailed,
    SharesPrefixes,
    TargetInfo,
    Verifier,
    VerifierError,
)
from fleet_edge.verifiers.radix import RadixTree, pack
from fleet_edge.verifiers.retained import HeldSequence, RetainedSequences

LEAST_REUSED: Final = 16
"""Tokens. To compute fewer costs hardly more than to copy them."""

TAIL: Final = 64
"""An ended sequence of which at most this many tokens would be lost is taken over rather than copied."""

_LOOKED_AT: Final = 256
"""Sequences that one lookup considers: it MUST NOT cost more the more begin alike."""

_MOST_RETAINED: Final = 4096
_FIRST_OF_OURS: Final = 1 << 32
"""Keys that the cache chooses itself begin here, apart from those of callers."""

T = TypeVar("T")


class PrefixCache:
    """`Verifier` over another, which nobody else may call.

    Args:
        verifier: Computes.
        sharing: Whose prefixes are taken over; with `off` nothing is retained.
        public: Beginnings of prompts that, with `device`, all devices share.
        share: Which part of what is in memory one owner may have retained before he makes room for all others.
    """

    def __init__(
        self,
        verifier: Verifier,
        *,
        sharing: PrefixSharing = PrefixSharing.ALL,
        public: Sequence[Sequence[int]] = (),
        share: Callable[[str], float] = lambda _owner: 1.0,
    ) -> None:
        self._verifier = verifier
        self._sharing = sharing
        self._public = RadixTree()
        for key, tokens in enumerate(public):
            self._public.insert(key, pack(tokens))
        self._tree = RadixTree()  # of the open ones what they expect, of the retained ones what they have computed
        self._open: dict[int, HeldSequence] = {}  # by the caller's key
        self._held: dict[int, HeldSequence] = {}  # by the key below: those that are open, and the retained ones
        self._retained = RetainedSequences(share)
        self._keys = count(_FIRST_OF_OURS)

    @property
    def info(self) -> TargetInfo:
        """The target model's identity and limits."""
        return self._verifier.info

    @property
    def retained_tokens(self) -> int:
        """Computed tokens of sequences that have ended."""
        return self._retained.tokens

    def open(self, sequence: int) -> None:
        """Begin a sequence with nothing computed."""
        self._require_new(sequence)
        held = HeldSequence(self._key(sequence), sequence)
        self._with_room(lambda: self._verifier.open(held.key))
        self._hold(held)

    def fork(self, sequence: int, source: int, length: int) -> None:
        """Begin a sequence with the first tokens of another."""
        origin = self._of(source)
        self._require_new(sequence)
        self._hold(self._fork(self._key(sequence), sequence, origin, length))

    def computed(self, sequence: int) -> int:
        """Return the number of tokens whose keys and values are stored."""
        return self._of(sequence).computed

    def score(self, items: Sequence[Item]) -> Logits:
        """Compute all items in one forward pass; retained sequences make room for it."""
        below = self._below(items)
        try:
            logits = self._score(below)
        except CapacityExceeded:
            if not len(self._retained) or not self._fits(below):
                raise
            logits = self._score(below)
        for item, own in zip(items, below, strict=True):
            held = self._held[own.sequence]
            held.tokens.extend(item.tokens)
            held.stable &= item.stable
        return logits

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all computed tokens from `length` on."""
        held = self._of(sequence)
        self._verifier.truncate(held.key, length)
        del held.tokens[length:]

    def close(self, sequence: int) -> None:
        """End a sequence; what it has computed is retained as long as there is room."""
        held = self._open.pop(sequence, None)
        if held is None:
            return
        held.caller = None
        self._tree.remove(held.key)
        if self._worth_keeping(held):
            self._retain(held)
        else:
            self._drop(held)

    def fits(self, items: Sequence[Item]) -> bool:
        """Return whether there is room for a step; retained sequences make room for it, here and now."""
        return self._fits(self._below(items))

    def capacity(self) -> int:
        """Return the tokens for which there is room; what retained sequences would leave comes on top of it."""
        return self._verifier.capacity()

    # As `RunsElsewhere`, which the verifier below may be

    def away(self) -> str:
        """Return why nothing can be computed now, in a sentence; empty if it can."""
        return self._verifier.away() if isinstance(self._verifier, RunsElsewhere) else ""

    def shut_down(self) -> None:
        if isinstance(self._verifier, RunsElsewhere):
            self._verifier.shut_down()

    # Beyond the contract

    def expect(self, sequence: int, tokens: Sequence[int], *, owner: str = "", stable: bool = True) -> None:
        """Tell which tokens an open sequence is going to compute first.

        Args:
            sequence: Its key.
            tokens: Token ids.
            owner: Whose they are.
            stable: As its items are going to be.
        """
        held = self._of(sequence)
        held.owner, held.stable = owner, stable
        if self._sharing is not PrefixSharing.OFF:
            held.expected = pack(tokens)
            held.public = next(self._public.matches(held.expected), (0, 0))[0]
            self._tree.insert(held.key, held.expected)
        if isinstance(self._verifier, SharesPrefixes):
            self._verifier.isolate(held.key, self._namespace(owner))

    def reuse(self, sequence: int) -> int:
        """Take over what another sequence has computed of what is expected of this one, but for the last token.

        Returns:
            By how many computed tokens the sequence has grown: 0, or at least `LEAST_REUSED`.
        """
        held = self._of(sequence)
        length, source = self._longest(held)
        gained = length - held.computed
        if source is None or gained < LEAST_REUSED:
            return 0
        try:
            found = self._take(source, length, taker=held)
        except CapacityExceeded:
            return 0
        found.owner, found.expected, found.stable = held.owner, held.expected, held.stable
        found.public = held.public
        if isinstance(self._verifier, SharesPrefixes):
            self._verifier.isolate(found.key, self._namespace(held.owner))
        self._drop(held)
        self._hold(found)
        self._tree.insert(found.key, found.expected)
        return gained

    def ahead(self, sequence: int, *, computing: Container[int], able: Container[int] = ()) -> tuple[int, int] | None:
        """Return the open sequence that comes first to what this one needs next, and how many tokens both expect.

        Args:
            sequence: Its key.
            computing: Sequences that are in the next step.
            able: Sequences that could be put into it.

        Returns:
            None if no such sequence is to compute more of it than can be taken over now, or none but this one should.
        """
        held = self._of(sequence)
        available = held.computed
        first: tuple[int, int, int] | None = None
        for reach, common, other in self._alike(held.expected, held):
            if reach < held.computed + LEAST_REUSED:
                break
            if common < held.computed + LEAST_REUSED:
                continue
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
        del held.tokens[:]

    def clear(self) -> None:
        """Free the memory of all retained sequences."""
        for held in self._retained:
            self._drop(held)

    # Lookups

    def _alike(self, tokens: bytes, but: HeldSequence) -> Iterator[tuple[int, int, HeldSequence]]:
        """Yield other sequences that begin alike.

        Yields:
            How many first tokens are the same, the most first; how many of these may be taken over; the sequence.
        """
        for reach, key in islice(self._tree.matches(tokens), _LOOKED_AT):
            other = self._held[key]
            if other is not but and other.stable >= but.stable:
                yield reach, reach if self._is_one(other, but) else min(reach, but.public), other

    def _is_one(self, source: HeldSequence, taker: HeldSequence) -> bool:
        """Whether one sequence may go on from all that another has computed."""
        return self._sharing is PrefixSharing.ALL or source.owner == taker.owner

    def _namespace(self, owner: str) -> str:
        """Return the name of what a sequence shares its prefix with, for a verifier that has a cache of its own."""
        match self._sharing:
            case PrefixSharing.ALL:
                return ""
            case PrefixSharing.DEVICE:
                return f"device {owner}"
            case PrefixSharing.OFF:
                return f"session {secrets.token_hex(16)}"

    def _longest(self, held: HeldSequence) -> tuple[int, HeldSequence | None]:
        """Return how many of the expected tokens, all but the last, another has computed, and which."""
        best, found = 0, None
        most = len(held.expected) // held.tokens.itemsize - 1
        for reach, common, other in self._alike(held.expected, held):
            if min(reach, most) <= best:
                break
            length = min(common, other.computed, most)
            # What is in the tree of an open one is but a promise: it counts what it has really computed.
            if length > best and other.begins_as(held.expected, length):
                best, found = length, other
        return best, found

    def _worth_keeping(self, held: HeldSequence) -> bool:
        """Whether there is something in what a sequence has computed that no other has computed too."""
        if self._sharing is PrefixSharing.OFF or held.computed < LEAST_REUSED:
            return False
        tokens = held.tokens.tobytes()
        for reach, common, other in self._alike(tokens, held):
            if reach < held.computed:
                break
            if common == reach and other.begins_as(tokens, held.computed):
                if other in self._retained:
                    self._retained.used(other)
                return False
        return True

    # What is held

    def _hold(self, held: HeldSequence) -> None:
        assert held.caller is not None
        self._open[held.caller] = held
        self._held[held.key] = held

    def _retain(self, held: HeldSequence) -> None:
        tokens = held.tokens.tobytes()
        for key in self._tree.prefixes(tokens):
            other = self._held[key]
            serves = self._is_one(held, other) or other.computed <= other.public
            if other in self._retained and serves and held.stable >= other.stable:
                self._drop(other)  # whomever it served, this one serves as well
        if len(self._retained) >= _MOST_RETAINED:
            self._drop_one()
        self._tree.insert(held.key, tokens)
        self._retained.add(held)

    def _take(self, source: HeldSequence, length: int, *, taker: HeldSequence) -> HeldSequence:
        """Return a sequence that has computed the first tokens of another, for the caller of a third.

        Raises:
            CapacityExceeded: There is no room for a copy.
        """
        caller = taker.caller
        assert caller is not None
        if source.caller is not None:
            return self._fork(next(self._keys), caller, source, length)
        self._retained.used(source)
        mine = self._is_one(source, taker)
        if source.computed - length > TAIL or not mine:
            try:
                return self._fork(next(self._keys), caller, source, length)
            except CapacityExceeded:
                if not mine:
                    raise
                # There is room for one of the two, and this is the one that is needed.
        self._retained.remove(source)
        self._tree.remove(source.key)
        self._verifier.truncate(source.key, length)
        del source.tokens[length:]
        source.caller = caller
        return source

    def _fork(self, key: int, caller: int, source: HeldSequence, length: int) -> HeldSequence:
        self._with_room(lambda: self._verifier.fork(key, source.key, length), keep=source)
        return HeldSequence(key, caller, tokens=source.tokens[:length], stable=source.stable)

    def _drop(self, held: HeldSequence) -> None:
        if held in self._retained:
            self._retained.remove(held)
        self._tree.remove(held.key)
        self._verifier.close(held.key)
        del self._held[held.key]

    def _drop_one(self, *, keep: HeldSequence | None = None) -> bool:
        """Free the memory of a retained sequence; return whether there was any."""
        if not len(self._retained):
            return False
        whole = sum(held.computed for held in self._held.values())
        held = self._retained.first_to_go(whole=whole, keep=keep)
        if held is not None:
            self._drop(held)
        return held is not None

    # The verifier below

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
        """Return a free key below: the caller's own if it is free, so that errors name it."""
        return sequence if sequence not in self._held else next(self._keys)
