"""Retained sequences: those that have ended and whose keys and values are still there, and which goes first."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class HeldSequence:
    """A sequence whose keys and values a verifier holds.

    Attributes:
        key: Its key there.
        caller: Its key for whoever has opened it; None if it has ended.
        owner: Whose text it is.
        tokens: Computed.
        expected: Tokens that it was said to compute first, as `radix.pack` gives them; may be none.
        public: How many of these any owner may share, from the first on.
        stable: Whether all that it has computed was asked for as stable (see `Item`).
    """

    key: int
    caller: int | None
    owner: str = ""
    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    expected: bytes = b""
    public: int = 0
    stable: bool = True

    @property
    def computed(self) -> int:
        return len(self.tokens)

    def begins_as(self, tokens: bytes, length: int) -> bool:
        """Whether its first `length` computed tokens are those of `tokens`."""
        return self.tokens[:length].tobytes() == tokens[: length * self.tokens.itemsize]


class RetainedSequences:
    """Sequences that have ended.

    Args:
        share: Which part of what is in memory one owner may have retained before he makes room for all others.
    """

    def __init__(self, share: Callable[[str], float]) -> None:
        self._share = share
        self._by_key: dict[int, HeldSequence] = {}  # the one unused for longest first
        self._owned = Counter[str]()

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[HeldSequence]:
        return iter(list(self._by_key.values()))

    def __contains__(self, held: object) -> bool:
        return isinstance(held, HeldSequence) and held.key in self._by_key

    @property
    def tokens(self) -> int:
        """Computed tokens of all of them."""
        return self._owned.total()

    def add(self, held: HeldSequence) -> None:
        """Take a sequence that has ended."""
        self._by_key[held.key] = held
        self._owned[held.owner] += held.computed

    def remove(self, held: HeldSequence) -> None:
        """Let go of a sequence; its tokens MUST be what they were when it came."""
        del self._by_key[held.key]
        self._owned[held.owner] -= held.computed
        if not self._owned[held.owner]:
            del self._owned[held.owner]

    def used(self, held: HeldSequence) -> None:
        """Note that a sequence was of use."""
        self._by_key[held.key] = self._by_key.pop(held.key)

    def first_to_go(self, *, whole: int, keep: HeldSequence | None = None) -> HeldSequence | None:
        """Return which sequence makes room: the one unused for longest, of those whose owner has more than his share.

        Args:
            whole: Tokens in memory, of which shares are parts.
            keep: One that stays.

        Returns:
            None if there is none but that.
        """
        greedy = {owner for owner, tokens in self._owned.items() if tokens > self._share(owner) * whole}
        candidates = [held for held in self._by_key.values() if held is not keep]
        return next((held for held in candidates if held.owner in greedy), next(iter(candidates), None))
