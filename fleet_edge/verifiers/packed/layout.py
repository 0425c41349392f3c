"""Step layout: which rows of the packed input belong to which sequence, and which share an attention call.

The packed row is ordered by slab and slot. Neighbours with few new tokens each share one call (a *group*): their keys
are a view of the slab, and the grouped heads are folded into the query rows, `[sequences, kv_heads, heads / kv_heads *
rows, dim]`, so that keys are read once for all heads that share them. A sequence with many new tokens (prefill) is a
group of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fleet_edge.verifiers.packed.kv import Slab, Slot


class Index:
    """One list; a tensor once all have been sent."""

    __slots__ = ("_all", "_begin", "_end", "_tensor")

    def __init__(self, everything: "Indices", begin: int, end: int) -> None:
        self._all = everything
        self._begin, self._end = begin, end
        self._tensor: torch.Tensor | None = None

    def __len__(self) -> int:
        return self._end - self._begin

    @property
    def tensor(self) -> torch.Tensor:
        """The list on the device, int64 `[len(self)]`."""
        if self._tensor is None:
            self._tensor = self._all.sent[self._begin : self._end]
        return self._tensor


class Indices:
    """Lists that are collected, then sent to a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._values: list[int] = []
        self._sent: torch.Tensor | None = None

    def add(self, values: Sequence[int]) -> Index:
        assert self._sent is None, "what has been sent cannot grow"
        begin = len(self._values)
        self._values.extend(values)
        return Index(self, begin, len(self._values))

    def send(self) -> None:
        on_gpu = self.device.type == "cuda"
        # A GPU copies from pinned memory asynchronously.
        host = torch.tensor(self._values, dtype=torch.int64, pin_memory=on_gpu)
        self._sent = host.to(self.device, non_blocking=on_gpu)

    @property
    def sent(self) -> torch.Tensor:
        """All lists, concatenated, on the device."""
        assert self._sent is not None, "nothing has been sent"
        return self._sent


FEW_ROWS = 16
"""Sequences with at most this number of new tokens share calls, padded to the widest among them."""

BRIDGED_TOKENS = 512
"""Most tokens of capacity of idle slots between two busy ones that are computed too, their result dropped: a separate
call costs as much as some hundred tokens of attention."""


@dataclass(frozen=True, slots=True, eq=False)
class SequenceSpan:
    """One sequence's part of a step: `count` tokens after `start` computed ones."""

    slot: Slot
    start: int
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """Where the new keys and values of the rows `[begin, end)` go: a slot and a position for each row."""

    slab: Slab
    begin: int
    end: int
    slots: Index
    places: Index


@dataclass(slots=True, eq=False)
class Group:
    """Rows `[begin, end)`, answered by one attention call over neighbouring slots.

    Attributes:
        sequences: Number of slots, idle ones included.
        width: Query rows a slot.
        gather: `[sequences * width]`: the row, counted from `begin`, that fills each query row; None if they are the
            rows as they lie.
        scatter: `[end - begin]`: the query row that answers each row; None likewise.
        positions: `[sequences * width]`: of the query rows, in their sequence.
        longest: Keys of the call: the tokens of the longest sequence, those of the step among them.
    """

    slab: Slab
    first: int
    sequences: int
    width: int
    begin: int
    end: int
    gather: Index | None
    scatter: Index | None
    positions: Index
    lowest: int
    longest: int
    _masks: dict[tuple[int | None, int, torch.dtype], tuple[int, torch.Tensor]] = field(default_factory=dict)

    def mask(self, window: int | None, *, heads: int, dtype: torch.dtype) -> tuple[int, torch.Tensor]:
        """Return which keys each query row sees; made once for all layers with this window.

        Rows are repeated `heads` times: query heads that share a key head. Returns the first key that any row sees, and
        `[sequences, 1, heads * width, keys]` from there on: 0 or minus infinity.
        """
        known = self._masks.get((window, heads, dtype))
        if known is not None:
            return known
        first = 0 if window is None else max(0, self.lowest - window + 1)
        positions = self.positions.tensor
        device = positions.device
        keys = torch.arange(first, self.longest, device=device)
        rows = positions.view(self.sequences, self.width, 1)
        hidden = keys > rows
        if window is not None:
            hidden |= keys <= rows - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        made = first, mask.repeat(1, heads, 1).unsqueeze(1)
        self._masks[window, heads, dtype] = made
        return made


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A step: `order` and `starts` index its parts by packed row; the groups cover every row once."""

    order: tuple[int, ...]
    starts: tuple[int, ...]
    rows: int
    writes: tuple[Write, ...]
    groups: tuple[Group, ...]


def lay_out(parts: Sequence[SequenceSpan], indices: Indices) -> Layout:
    """Lay out a step of distinct sequences; usable once `indices` have been sent."""
    slabs: dict[int, list[int]] = {}
    for index, part in enumerate(parts):
        slabs.setdefault(id(part.slot.slab), []).append(index)
    order: list[int] = []
    starts = [0] * len(parts)
    writes: list[Write] = []
    groups: list[Group] = []
    row = 0
    for members in slabs.values():
        begin = row
        for run in _runs(parts, members):
            for index in run:
                starts[index] = row
                row += parts[index].count
            groups.append(_group([parts[index] for index in run], begin=starts[run[0]], indices=indices))
            order.extend(run)
        placed = [parts[index] for index in order[-len(members) :]]
        writes.append(_write(placed, begin=begin, end=row, indices=indices))
    return Layout(tuple(order), tuple(starts), row, tuple(writes), tuple(groups))


def _runs(parts: Sequence[SequenceSpan], members: Sequence[int]) -> Iterator[list[int]]:
    run: list[int] = []
    for index in sorted(members, key=lambda index: parts[index].slot.index):
        part = parts[index]
        if part.count > FEW_ROWS:
            yield [index]
            continue
        if run:
            idle = part.slot.index - parts[run[-1]].slot.index - 1
            if idle * part.slot.slab.capacity > BRIDGED_TOKENS:
                yield run
                run = []
        run.append(index)
    if run:
        yield run


def _write(parts: Sequence[SequenceSpan], *, begin: int, end: int, indices: Indices) -> Write:
    slab = parts[0].slot.slab
    slots: list[int] = []
    places: list[int] = []
    for part in parts:
        slots.extend([part.slot.index] * part.count)
        places.extend(range(part.start, part.start + part.count))
    return Write(slab, begin, end, indices.add(slots), indices.add(places))


def _group(parts: Sequence[SequenceSpan], *, begin: int, indices: Indices) -> Group:
    slab, first = parts[0].slot.slab, parts[0].slot.index
    sequences = parts[-1].slot.index - first + 1
    width = max(part.count for part in parts)
    rows = sum(part.count for part in parts)
    # Padding rows repeat row 0 at a similar position, so that their dropped result is finite.
    gather = [0] * (sequences * width)
    positions = [parts[0].start] * (sequences * width)
    scatter: list[int] = []
    for part in parts:
        line = (part.slot.index - first) * width
        positions[line : line + width] = [part.start] * width
        for offset in range(part.count):
            gather[line + offset] = len(scatter)
            positions[line + offset] = part.start + offset
            scatter.append(line + offset)
    as_they_lie = rows == sequences * width
    return Group(
        slab=slab,
        first=first,
        sequences=sequences,
        width=width,
        begin=begin,
        end=begin + rows,
        gather=None if as_they_lie else indices.add(gather),
        scatter=None if as_they_lie else indices.add(scatter),
        positions=indices.add(positions),
        lowest=min(part.start for part in parts),
        longest=max(part.start + part.count for part in parts),
    )
