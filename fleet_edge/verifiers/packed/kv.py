"""The store of keys and values: a slot a sequence, slots of like capacity side by side, memory by use.

Attention is fastest when one batched call reads the keys of many sequences without copying them, which
needs them in one tensor at equal distances. So a sequence lives in a *slot*; slots of one capacity form a
*shelf*; a shelf is a list of *slabs*, tensors `[slots, capacity, kv_heads, dim]` for every layer, added as
sessions come. A sequence that outgrows its slot moves to the next larger capacity (each a half or a third
above the last, so a copied token is paid for by the tokens computed since), and the slot it leaves is filled
by the shelf's last one: shelves have no holes, and a slab that empties is freed.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["KVStore", "LayerShape", "Slab", "Slot", "slot_capacity"]

SMALLEST_SLOT = 64
"""Tokens. Below this the rounding costs less than the bookkeeping."""

FIRST_SLAB_SLOTS = 4
"""A shelf's first slab is small, later ones double, so that few sessions take little and many share calls."""

SLAB_TOKENS = 8192
"""Most tokens in a slab: long slots gain nothing from company, and are freed one by one."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer stores for a token.

    Attributes:
        kv_heads: Number of key and value heads.
        key_dim: Size of a key.
        value_dim: Size of a value.
    """

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers(self) -> int:
        """Numbers stored for a token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True, eq=False)
class Slab:
    """Memory of some slots, all layers.

    Attributes:
        keys: By layer, `[slots, capacity, kv_heads, key_dim]`.
        values: By layer, `[slots, capacity, kv_heads, value_dim]`.
        slots: Number of slots.
        capacity: Tokens in each.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    slots: int
    capacity: int

    def copy(self, index: int, source: "Slab", source_index: int, length: int) -> None:
        """Fill a slot with the first `length` tokens of another, the rest with zeros.

        Zeros, because masked positions are multiplied by a weight of zero, and what an allocator leaves
        behind may be not a number.
        """
        for mine, theirs in zip(self.keys + self.values, source.keys + source.values, strict=True):
            mine[index, :length] = theirs[source_index, :length]
            mine[index, length:] = 0

    def clear(self, index: int) -> None:
        """Fill a slot with zeros."""
        for tensor in self.keys + self.values:
            tensor[index] = 0


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Where a sequence's keys and values are, until the store changes next."""

    slab: Slab
    index: int


def slot_capacity(length: int, *, context: int) -> int:
    """Return the capacity of the slot for `length` tokens: 64, 96, 128, 192, 256, …, at most the context."""
    capacity = SMALLEST_SLOT
    while capacity < length:
        middle = capacity + capacity // 2
        capacity = middle if middle >= length else 2 * capacity
    return min(capacity, max(context, length))


class KVStore:
    """Keys and values of all sequences. Lengths are the caller's account."""

    def __init__(self, shapes: Sequence[LayerShape], *, context: int, dtype: torch.dtype, device: torch.device) -> None:
        """Begin empty; memory is taken as sequences come.

        Args:
            shapes: By layer.
            context: Most tokens in a sequence.
            dtype: Of what is stored.
            device: Where.
        """
        self._shapes = tuple(shapes)
        self._context = context
        self._dtype = dtype
        self._device = device
        self._shelves: dict[int, _Shelf] = {}
        self._homes: dict[int, tuple[int, int]] = {}  # sequence -> capacity of its shelf, position there

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers."""
        return sum(shape.numbers for shape in self._shapes) * self._dtype.itemsize

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all slabs."""
        tokens = sum(slab.slots * slab.capacity for shelf in self._shelves.values() for slab in shelf.slabs)
        return tokens * self.bytes_per_token

    @torch.inference_mode()
    def reserve(self, sequence: int, length: int, *, keep: int) -> None:
        """Give a sequence a slot for `length` tokens, with its first `keep` in place.

        Raises:
            MemoryError: The machine has no more; everything is as before.
        """
        home = self._homes.get(sequence)
        if home is not None and home[0] >= length:
            return
        capacity = slot_capacity(length, context=self._context)
        shelf = self._shelves.setdefault(capacity, _Shelf(capacity))
        try:
            shelf.grow(self._slab)
        except RuntimeError as error:  # torch's own class for this is a RuntimeError, its CPU allocator's a plain one
            raise MemoryError(str(error)) from error
        position = len(shelf.owners)
        target = shelf.slot(position)
        if home is None:
            target.slab.clear(target.index)
        else:
            source = self._shelves[home[0]].slot(home[1])
            target.slab.copy(target.index, source.slab, source.index, keep)
            self.release(sequence)
        shelf.owners.append(sequence)
        self._homes[sequence] = (capacity, position)

    def slot(self, sequence: int) -> Slot:
        """Return where a sequence is; it MUST have been given a slot."""
        capacity, position = self._homes[sequence]
        return self._shelves[capacity].slot(position)

    @torch.inference_mode()
    def release(self, sequence: int) -> None:
        """Take a sequence's slot back; unknown ones are ignored."""
        home = self._homes.pop(sequence, None)
        if home is None:
            return
        capacity, position = home
        shelf = self._shelves[capacity]
        last = len(shelf.owners) - 1
        if position != last:
            hole, filler = shelf.slot(position), shelf.slot(last)
            hole.slab.copy(hole.index, filler.slab, filler.index, capacity)
            moved = shelf.owners[last]
            shelf.owners[position] = moved
            self._homes[moved] = (capacity, position)
        shelf.owners.pop()
        shelf.shrink()

    def _slab(self, slots: int, capacity: int) -> Slab:
        def empty(heads: int, dim: int) -> torch.Tensor:
            return torch.empty((slots, capacity, heads, dim), dtype=self._dtype, device=self._device)

        return Slab(
            keys=tuple(empty(shape.kv_heads, shape.key_dim) for shape in self._shapes),
            values=tuple(empty(shape.kv_heads, shape.value_dim) for shape in self._shapes),
            slots=slots,
            capacity=capacity,
        )


class _Shelf:
    """Slots of one capacity, numbered through its slabs, occupied from 0 without holes.

    Attributes:
        owners: By position, the sequence that lives there.
        slabs: In order; the first slots of a shelf are the first slab's.
    """

    def __init__(self, capacity: int) -> None:
        self.owners: list[int] = []
        self.slabs: list[Slab] = []
        self._capacity = capacity
        self._starts: list[int] = []  # position of each slab's first slot

    def slot(self, position: int) -> Slot:
        """Return the slot at a position."""
        which = bisect.bisect_right(self._starts, position) - 1
        return Slot(self.slabs[which], position - self._starts[which])

    def grow(self, make: Callable[[int, int], Slab]) -> None:
        """Add a slab if all slots are taken."""
        end = self._starts[-1] + self.slabs[-1].slots if self.slabs else 0
        if len(self.owners) < end:
            return
        slots = max(1, min(FIRST_SLAB_SLOTS << len(self.slabs), SLAB_TOKENS // self._capacity))
        self.slabs.append(make(slots, self._capacity))
        self._starts.append(end)

    def shrink(self) -> None:
        """Free slabs that nobody lives in."""
        while self.slabs and self._starts[-1] >= len(self.owners):
            self.slabs.pop()
            self._starts.pop()
