"""Slabs: the tensors that hold keys and values of several slots, taken from the machine within a budget of bytes.

The budget holds at every moment, not only between steps: a slab that changes its number of slots is copied one tensor
at a time, so that no more than one tensor exists twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["LayerShape", "Slab", "SlabMemory", "Slot"]


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


@dataclass(slots=True, eq=False)
class Slab:
    """Memory of some slots, all layers.

    Attributes:
        keys: By layer, `[slots, capacity, kv_heads, key_dim]`.
        values: By layer, `[slots, capacity, kv_heads, value_dim]`.
        slots: Number of slots.
        capacity: Tokens in each.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
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

    @property
    def largest_bytes(self) -> int:
        """Bytes of its largest tensor: what widening it takes for a moment."""
        return max(tensor.nbytes for tensor in self.keys + self.values)


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Where a sequence's keys and values are, until the store changes next."""

    slab: Slab
    index: int


class SlabMemory:
    """Makes, resizes and frees slabs; what they take together never exceeds the budget."""

    def __init__(
        self, shapes: Sequence[LayerShape], *, budget_bytes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Begin with nothing taken.

        Args:
            shapes: By layer.
            budget_bytes: Most bytes of all tensors together, at any moment.
            dtype: Of what is stored.
            device: Where.
        """
        self._shapes = tuple(shapes)
        self._dtype = dtype
        self._device = device
        self._taken = 0
        self.budget_bytes = budget_bytes
        self.bytes_per_token = sum(shape.numbers for shape in self._shapes) * dtype.itemsize
        self._widest = max(shape.kv_heads * max(shape.key_dim, shape.value_dim) for shape in self._shapes)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all slabs."""
        return self._taken

    @property
    def free_bytes(self) -> int:
        """Bytes that the budget has left."""
        return self.budget_bytes - self._taken

    def slot_bytes(self, capacity: int) -> int:
        """Return the bytes of a slot."""
        return capacity * self.bytes_per_token

    def shrinking_bytes(self, slots: int, capacity: int) -> int:
        """Return the bytes that making a slab smaller takes for a moment: its largest tensor, in the new size."""
        return slots * capacity * self._widest * self._dtype.itemsize

    def make(self, slots: int, capacity: int) -> Slab:
        """Return a new slab, its content undefined.

        Raises:
            MemoryError: The machine has no more; nothing was taken.
        """
        slab = Slab([], [], slots, capacity)
        try:
            for shape in self._shapes:
                slab.keys.append(self._take(slots, capacity, shape.kv_heads, shape.key_dim))
                slab.values.append(self._take(slots, capacity, shape.kv_heads, shape.value_dim))
        except MemoryError:
            self.free(slab)
            raise
        return slab

    def resize(self, slab: Slab, slots: int, *, keep: int) -> None:
        """Give a slab another number of slots, the first `keep` with their content.

        Raises:
            MemoryError: The machine has no more; all slots that the slab had are still there.
        """
        if slots > slab.slots:
            self._replace(slab, slots, keep)
            slab.slots = slots
        else:
            slab.slots = slots  # first: a slab may have more than it says if the machine fails half-way
            self._replace(slab, slots, keep)

    def free(self, slab: Slab) -> None:
        """Give a slab's tensors back; it must not be used any more."""
        self._taken -= sum(tensor.nbytes for tensor in slab.keys + slab.values)
        slab.keys.clear()
        slab.values.clear()

    def _replace(self, slab: Slab, slots: int, keep: int) -> None:
        for tensors in (slab.keys, slab.values):
            for layer in range(len(tensors)):
                # The old tensor is gone when this returns, so that the next one finds its room.
                tensors[layer] = self._resized(tensors[layer], slots, keep)

    def _resized(self, old: torch.Tensor, slots: int, keep: int) -> torch.Tensor:
        new = self._take(slots, *old.shape[1:])
        new[:keep] = old[:keep]
        self._taken -= old.nbytes
        return new

    def _take(self, *shape: int) -> torch.Tensor:
        size = self._dtype.itemsize
        for length in shape:
            size *= length
        assert self._taken + size <= self.budget_bytes, "the key/value store has planned beyond its budget"
        try:
            tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        except RuntimeError as error:  # torch's own class for this is a RuntimeError, its CPU allocator's a plain one
            raise MemoryError(str(error)) from error
        self._taken += size
        return tensor
