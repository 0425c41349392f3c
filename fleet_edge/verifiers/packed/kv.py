"""Key/value store: a slot a sequence, slots of like capacity side by side, memory within a budget.

Attention is fastest when one batched call reads the keys of many sequences without copying, which needs them in one
tensor at equal distances. So a sequence has a *slot*; slots of one capacity form a *size class*, a growing list of
*slabs*: tensors `[slots, kv_heads, capacity, dim]` for every layer. A sequence that outgrows its slot moves to the next
larger capacity, and the last slot of the size class fills the gap; a slab that empties is freed.

Memory is planned a step at a time. All slots that a step needs exist before the first sequence moves, and a sequence's
old slot is given back only when its new one is filled, so that both count. Memory left over makes spare slots,
which are given up again when a step needs their memory.
"""

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch


@dataclass(frozen=True, slots=True)
class LayerShape:
    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(slots=True, eq=False)
class Slab:
    """Memory of some slots: by layer, keys and values `[slots, kv_heads, capacity, dim]`."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    slots: int
    capacity: int

    def copy(self, index: int, source: "Slab", source_index: int, length: int) -> None:
        """Fill a slot with the first `length` tokens of another, the rest with zeros.

        Zeros, because a masked position is multiplied by zero, and uninitialised memory may be NaN.
        """
        for mine, theirs in zip(self.keys + self.values, source.keys + source.values, strict=True):
            mine[index, :, :length] = theirs[source_index, :, :length]
            mine[index, :, length:] = 0

    def clear(self, index: int) -> None:
        for tensor in self.keys + self.values:
            tensor[index] = 0


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Where a sequence's keys and values are, until the store changes next."""

    slab: Slab
    index: int


class SlabMemory:
    """Make, resize and free slabs within a budget of bytes."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shapes = tuple(shapes)
        self._dtype = dtype
        self._device = device
        self._taken = 0
        self.budget_bytes = budget_bytes
        self.bytes_per_token = sum(shape.numbers for shape in self._shapes) * dtype.itemsize
        self._widest = max(shape.kv_heads * max(shape.key_dim, shape.value_dim) for shape in self._shapes)

    @property
    def allocated_bytes(self) -> int:
        return self._taken

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self._taken

    def slot_bytes(self, capacity: int) -> int:
        return capacity * self.bytes_per_token

    def shrinking_bytes(self, slots: int, capacity: int) -> int:
        """Return the bytes that shrinking a slab needs temporarily: its largest tensor in the new size."""
        return slots * capacity * self._widest * self._dtype.itemsize

    def make(self, slots: int, capacity: int) -> Slab:
        """Return a new slab, its content undefined; raises MemoryError and takes nothing if there is no memory."""
        slab = Slab([], [], slots, capacity)
        try:
            for shape in self._shapes:
                slab.keys.append(self._take(slots, shape.kv_heads, capacity, shape.key_dim))
                slab.values.append(self._take(slots, shape.kv_heads, capacity, shape.value_dim))
        except MemoryError:
            self.free(slab)
            raise
        return slab

    def resize(self, slab: Slab, slots: int, *, keep: int) -> None:
        """Change a slab's number of slots, keeping the content of the first `keep`.

        Raises MemoryError if the machine has no more; all slots that the slab had are still there.
        """
        if slots > slab.slots:
            self._replace(slab, slots, keep)
            slab.slots = slots
        else:
            slab.slots = slots  # first: a slab may have more than it says if the machine fails half-way
            self._replace(slab, slots, keep)

    def free(self, slab: Slab) -> None:
        self._taken -= sum(tensor.nbytes for tensor in slab.keys + slab.values)
        slab.keys.clear()
        slab.values.clear()

    def _replace(self, slab: Slab, slots: int, keep: int) -> None:
        for tensors in (slab.keys, slab.values):
            for layer in range(len(tensors)):
                # The old tensor is freed when this returns, so that the next one has memory.
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


SMALLEST_SLOT: Final = 64
"""Fewest tokens of a slot: below this, rounding up costs less than bookkeeping."""

FIRST_SLAB_SLOTS: Final = 4
"""A size class begins small and doubles, so that few sessions take little and many share calls."""

SLAB_TOKENS: Final = 8192
"""Most tokens in a slab: long slots gain nothing from sharing one, and are freed one by one."""

SLAB_SHARE: Final = 8
"""A slab of several slots takes at most this part of the budget, so that no size class starves the others."""

SPARE_SHARE: Final = 4
"""Slots for sessions to come take at most this part of the memory that is left over."""

_DENSEST_GROWTH: Final = 2
"""Most tokens of slots that a token costs once its sequence has outgrown a slot: at 97, 128 become 192 at 129."""


def slot_capacity(length: int, *, context: int) -> int:
    """Return the slot capacity for `length` tokens: 64, 96, 128, 192, 256, …, at most the context."""
    capacity = SMALLEST_SLOT
    while capacity < length:
        middle = capacity + capacity // 2
        capacity = middle if middle >= length else 2 * capacity
    return min(capacity, max(context, length))


def tokens_to_serve(length: int) -> int:
    """Return the budget, in tokens of slots, for one sequence up to `length`, including the slot it grows out of."""
    before = SMALLEST_SLOT
    if length <= before:
        return length
    while slot_capacity(before + 1, context=length) < length:
        before = slot_capacity(before + 1, context=length)
    return before + length


def servable_context(context: int, *, budget_tokens: int) -> int:
    """Return the longest sequence, up to the context, that a budget in tokens of slots serves."""
    if tokens_to_serve(context) <= budget_tokens:
        return context
    return bisect.bisect_right(range(1, context), budget_tokens, key=tokens_to_serve)


class KVStore:
    """Keys and values of all sequences; the caller keeps their lengths."""

    def __init__(self, memory: SlabMemory, *, context: int) -> None:
        self._memory = memory
        self._context = context
        self._classes: dict[int, _SizeClass] = {}
        self._places: dict[int, tuple[int, int]] = {}  # sequence -> capacity of its slot, position in the size class

    @property
    def allocated_bytes(self) -> int:
        return self._memory.allocated_bytes

    def missing_bytes(self, lengths: Mapping[int, int]) -> int:
        """Return how many bytes a step lacks; `lengths` maps each sequence to the tokens that it is to hold."""
        coming = self._coming(lengths)
        needed, free = self._needed(coming), self._memory.free_bytes
        for size_class in self._idle(coming):
            if needed <= free or self._trim_bytes(size_class, coming) > free:
                break
            free += self._memory.slot_bytes(size_class.capacity) * (size_class.empty - coming[size_class.capacity])
        return max(0, needed - free)

    @torch.inference_mode()
    def reserve(self, lengths: Mapping[int, int], *, keep: Mapping[int, int]) -> None:
        """Give sequences slots, with the first `keep` tokens of their old ones; `missing_bytes` MUST be 0.

        Raises MemoryError if the machine has no more; every sequence keeps what it had.
        """
        try:
            self._make_slots(self._coming(lengths))
            for sequence, length in lengths.items():
                place = self._places.get(sequence)
                if place is None or place[0] < length:
                    capacity, source = slot_capacity(length, context=self._context), None if place is None else sequence
                    self._move(sequence, capacity, source=source, keep=keep[sequence])
        finally:
            self._free_empty_slabs()

    @torch.inference_mode()
    def fork(self, sequence: int, source: int, length: int) -> None:
        """Give a new sequence a slot with a copy of another's first tokens; `missing_bytes` MUST be 0.

        Raises MemoryError if the machine has no more; the sequence has no slot.
        """
        try:
            self._make_slots(self._coming({sequence: length}))
            self._move(sequence, slot_capacity(length, context=self._context), source=source, keep=length)
        finally:
            self._free_empty_slabs()

    def slot(self, sequence: int) -> Slot:
        capacity, position = self._places[sequence]
        return self._classes[capacity].slot(position)

    @torch.inference_mode()
    def release(self, sequence: int) -> None:
        self._leave(sequence)
        self._free_empty_slabs()

    def room(self, lengths: Mapping[int, int]) -> int:
        """Return a number of tokens that fits, whichever of the sequences with these current lengths they go to."""
        # The worst use of n tokens: one each for the sequences whose slots are full, and so on in the order of what a
        # token costs. Empty slots are not counted on: they may be of other capacities than are needed.
        left = self._memory.free_bytes
        steps: list[tuple[int, int]] = []  # tokens until a sequence needs a larger slot, and what that takes
        unused = 0
        for sequence, length in lengths.items():
            capacity, _ = self._places.get(sequence, (0, 0))
            if capacity >= self._context:
                unused += capacity - length
                continue
            grown = slot_capacity(capacity + 1, context=self._context)
            steps.append((capacity - length + 1, self._memory.slot_bytes(grown)))
        if not steps and lengths:
            return unused
        sure = min((tokens for tokens, _ in steps), default=1) - 1
        densest = _DENSEST_GROWTH * self._memory.bytes_per_token
        tokens = 0
        for more, cost in sorted(steps, key=lambda step: step[1] / step[0], reverse=True):
            if cost <= densest * more:
                break
            if cost > left:
                return max(sure, tokens + left * more // cost)
            left -= cost
            tokens += more
        return max(sure, tokens + left // densest)

    def _coming(self, lengths: Mapping[int, int]) -> Counter[int]:
        """Return, by capacity, how many sequences of a step move to a slot of it."""
        coming = Counter[int]()
        for sequence, length in lengths.items():
            place = self._places.get(sequence)
            if place is None or place[0] < length:
                coming[slot_capacity(length, context=self._context)] += 1
        return coming

    def _missing_slots(self, capacity: int, coming: Counter[int]) -> int:
        size_class = self._classes.get(capacity)
        return max(0, coming[capacity] - (size_class.empty if size_class else 0))

    def _needed(self, coming: Counter[int]) -> int:
        return sum(self._missing_slots(capacity, coming) * self._memory.slot_bytes(capacity) for capacity in coming)

    def _idle(self, coming: Counter[int]) -> list["_SizeClass"]:
        """Return the size classes with slots that a step leaves empty, the cheapest to shrink first."""
        classes = [
            size_class for size_class in self._classes.values() if size_class.empty > coming[size_class.capacity]
        ]
        return sorted(classes, key=lambda size_class: self._trim_bytes(size_class, coming))

    def _trim_bytes(self, size_class: "_SizeClass", coming: Counter[int]) -> int:
        slots = size_class.slabs[-1].slots - (size_class.empty - coming[size_class.capacity])
        return self._memory.shrinking_bytes(slots, size_class.capacity)

    def _make_slots(self, coming: Counter[int]) -> None:
        """Make all slots that a step needs, and spare ones where memory is left over."""
        needed = self._needed(coming)
        for size_class in self._idle(coming):
            if needed <= self._memory.free_bytes:
                break
            self._memory.resize(
                size_class.slabs[-1],
                size_class.slabs[-1].slots - (size_class.empty - coming[size_class.capacity]),
                keep=size_class.occupied_in_last,
            )
        for capacity in sorted(coming):
            missing = self._missing_slots(capacity, coming)
            if missing:
                needed -= missing * self._memory.slot_bytes(capacity)
                self._widen(self._classes.setdefault(capacity, _SizeClass(capacity)), missing, kept_bytes=needed)

    def _widen(self, size_class: "_SizeClass", missing: int, *, kept_bytes: int) -> None:
        """Add the missing slots, or double the class if that takes little of the memory left over."""
        slot_bytes = self._memory.slot_bytes(size_class.capacity)
        spare = self._memory.free_bytes - kept_bytes - missing * slot_bytes
        affordable = missing + spare // (SPARE_SHARE * slot_bytes)
        budget_tokens = self._memory.budget_bytes // self._memory.bytes_per_token
        most = max(1, min(SLAB_TOKENS, budget_tokens // SLAB_SHARE) // size_class.capacity)  # slots of a slab
        wanted = max(missing, min(most, affordable, size_class.slots or FIRST_SLAB_SLOTS))
        while wanted:
            last = size_class.slabs[-1] if size_class.slabs else None
            added = min(wanted, most - last.slots) if last else 0
            left = self._memory.free_bytes - kept_bytes - wanted * slot_bytes
            # To widen a slab needs its largest tensor again temporarily.
            if last is not None and added > 0 and max(each.nbytes for each in last.keys + last.values) <= left:
                self._memory.resize(last, last.slots + added, keep=size_class.occupied_in_last)
            else:
                added = min(wanted, most)
                size_class.append(self._memory.make(added, size_class.capacity))
            wanted -= added

    def _move(self, sequence: int, capacity: int, *, source: int | None, keep: int) -> None:
        size_class = self._classes[capacity]
        position = len(size_class.owners)
        target = size_class.slot(position)
        if source is None:
            target.slab.clear(target.index)
        else:
            origin = self.slot(source)
            target.slab.copy(target.index, origin.slab, origin.index, keep)
            self._leave(sequence)  # nothing, where it is another's
        size_class.owners.append(sequence)
        self._places[sequence] = (capacity, position)

    def _leave(self, sequence: int) -> None:
        """Empty a sequence's slot and move the last one of its size class there."""
        place = self._places.pop(sequence, None)
        if place is None:
            return
        capacity, position = place
        size_class = self._classes[capacity]
        last = len(size_class.owners) - 1
        if position != last:
            hole, filler = size_class.slot(position), size_class.slot(last)
            hole.slab.copy(hole.index, filler.slab, filler.index, capacity)
            moved = size_class.owners[last]
            size_class.owners[position] = moved
            self._places[moved] = (capacity, position)
        size_class.owners.pop()

    def _free_empty_slabs(self) -> None:
        for size_class in self._classes.values():
            while size_class.slabs and not size_class.occupied_in_last:
                self._memory.free(size_class.pop())


class _SizeClass:
    """Slots of one capacity, numbered through its slabs, occupied from 0 without holes.

    `owners` lists the sequence of each slot. Between steps only the last slab has empty slots.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.owners: list[int] = []
        self.slabs: list[Slab] = []
        self._starts: list[int] = []  # position of each slab's first slot

    @property
    def slots(self) -> int:
        return self._starts[-1] + self.slabs[-1].slots if self.slabs else 0

    @property
    def empty(self) -> int:
        return self.slots - len(self.owners)

    @property
    def occupied_in_last(self) -> int:
        return max(0, len(self.owners) - self._starts[-1])

    def append(self, slab: Slab) -> None:
        self._starts.append(self.slots)
        self.slabs.append(slab)

    def pop(self) -> Slab:
        self._starts.pop()
        return self.slabs.pop()

    def slot(self, position: int) -> Slot:
        which = bisect.bisect_right(self._starts, position) - 1
        return Slot(self.slabs[which], position - self._starts[which])
