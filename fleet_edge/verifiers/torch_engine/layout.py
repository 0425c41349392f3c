"""Step layout: which rows of the packed input belong to which sequence, and which share an attention call.

Sequences with few new tokens each share a call (a *group*) for which their pages are gathered. The grouped heads are
folded into the query rows, `[sequences, kv_heads, heads / kv_heads * rows, dim]`, so that keys are read once for all
heads that share them. A sequence with many new tokens (prefill) is a group of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fleet_edge.verifiers.blocks.kv import PAGE


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


@dataclass(frozen=True, slots=True, eq=False)
class SequenceSpan:
    """One sequence's part of a step: its pages, and `count` tokens after `start` computed ones."""

    pages: Sequence[int]
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(slots=True, eq=False)
class Group:
    """Rows `[begin, end)`, answered by one attention call.

    Attributes:
        width: Query rows of a sequence.
        gather: `[sequences * width]`: the row, counted from `begin`, that fills each query row; None if they are the
            rows as they lie.
        scatter: `[end - begin]`: the query row that answers each row; None likewise.
        positions: `[sequences * width]`: of the query rows, in their sequence.
        pages: `[sequences * pages]`: those of each, as many as the longest has.
        longest: Keys of the call: the tokens of the longest sequence, those of the step among them.
    """

    sequences: int
    width: int
    begin: int
    end: int
    gather: Index | None
    scatter: Index | None
    positions: Index
    pages: Index
    lowest: int
    longest: int
    _seen: dict[tuple[int | None, int, torch.dtype], tuple[torch.Tensor, slice, torch.Tensor]] = field(
        default_factory=dict
    )

    def seen(self, window: int | None, *, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, slice, torch.Tensor]:
        """Return which keys each query row sees; made once for all layers with this window.

        Rows are repeated `heads` times: query heads that share a key head. Returns the pages that any row sees, of all
        sequences in order; the keys of these in each sequence; and `[sequences, 1, heads * width, keys]`: 0 or minus
        infinity.
        """
        known = self._seen.get((window, heads, dtype))
        if known is not None:
            return known
        first = 0 if window is None else max(0, self.lowest - window + 1)
        before = first // PAGE
        pages = self.pages.tensor.view(self.sequences, -1)[:, before:].reshape(-1)
        positions = self.positions.tensor
        device = positions.device
        keys = torch.arange(first, self.longest, device=device)
        rows = positions.view(self.sequences, self.width, 1)
        hidden = keys > rows
        if window is not None:
            hidden |= keys <= rows - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        made = pages, slice(first - before * PAGE, self.longest - before * PAGE), mask.repeat(1, heads, 1).unsqueeze(1)
        self._seen[window, heads, dtype] = made
        return made


@dataclass(frozen=True, slots=True, eq=False)
class StepLayout:
    """A step: `order` and `starts` index its parts by packed row; the groups cover every row once.

    Attributes:
        places: Where the keys and values of each row go: page * PAGE + offset.
    """

    order: tuple[int, ...]
    starts: tuple[int, ...]
    rows: int
    places: Index
    groups: tuple[Group, ...]


def lay_out(parts: Sequence[SequenceSpan], indices: Indices, *, max_pages: int) -> StepLayout:
    """Lay out a step of distinct sequences; usable once `indices` have been sent.

    The sequences of a group have at most `max_pages` pages, or there is only one.
    """
    order: list[int] = []
    starts = [0] * len(parts)
    places: list[int] = []
    groups: list[Group] = []
    for run in _runs(parts, max_pages):
        groups.append(_group([parts[index] for index in run], begin=len(places), indices=indices))
        for index in run:
            starts[index] = len(places)
            part = parts[index]
            places.extend(part.pages[at // PAGE] * PAGE + at % PAGE for at in range(part.start, part.end))
        order.extend(run)
    return StepLayout(tuple(order), tuple(starts), len(places), indices.add(places), tuple(groups))


def _runs(parts: Sequence[SequenceSpan], max_pages: int) -> Iterator[list[int]]:
    run: list[int] = []
    # In the order of their lengths, so that little is gathered in vain.
    for index in sorted(range(len(parts)), key=lambda index: parts[index].end):
        part = parts[index]
        if part.count > FEW_ROWS:
            yield [index]
            continue
        if run and (len(run) + 1) * _page_count(part) > max_pages:
            yield run
            run = []
        run.append(index)
    if run:
        yield run


def _page_count(part: SequenceSpan) -> int:
    return -(-part.end // PAGE)


def _group(parts: Sequence[SequenceSpan], *, begin: int, indices: Indices) -> Group:
    width = max(part.count for part in parts)
    rows = sum(part.count for part in parts)
    most = max(map(_page_count, parts))
    # Padding rows repeat row 0 at a similar position, so that their dropped result is finite. So is page 0.
    gather = [0] * (len(parts) * width)
    positions: list[int] = []
    pages: list[int] = []
    scatter: list[int] = []
    for number, part in enumerate(parts):
        line = number * width
        positions.extend([*range(part.start, part.end), *[part.start] * (width - part.count)])
        pages.extend([*part.pages[: _page_count(part)], *[0] * (most - _page_count(part))])
        for offset in range(part.count):
            gather[line + offset] = len(scatter)
            scatter.append(line + offset)
    as_they_lie = rows == len(parts) * width
    return Group(
        sequences=len(parts),
        width=width,
        begin=begin,
        end=begin + rows,
        gather=None if as_they_lie else indices.add(gather),
        scatter=None if as_they_lie else indices.add(scatter),
        positions=indices.add(positions),
        pages=indices.add(pages),
        lowest=min(part.start for part in parts),
        longest=max(part.end for part in parts),
    )
