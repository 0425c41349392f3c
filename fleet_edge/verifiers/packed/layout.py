"""Step layout: which rows of the packed input belong to which sequence, and which share an attention call.

Sequences with few new tokens and similar lengths share one call (a *group*), padded to the widest and the longest among
them: their keys are gathered from their pages, and the grouped heads are folded into the query rows, `[sequences,
kv_heads, heads / kv_heads * rows, dim]`, so that keys are read once for all heads that share them. A sequence with many
new tokens (prefill) is a group of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fleet_edge.verifiers.paged import PAGE

FEW_ROWS: Final = 16
"""Sequences with at most this number of new tokens share calls."""

_STRETCH: Final = 2
"""The longest sequence of a group has at most this multiple of the tokens of the shortest, and some more."""

_SHORT: Final = 256
_GATHERED: Final = 1 << 17
"""Most keys gathered for one call, padding included, so that a step takes a bounded memory."""

_Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One sequence's part of a step: `count` tokens after `start` computed ones, in its pages."""

    pages: Sequence[int]
    start: int
    count: int

    @property
    def length(self) -> int:
        return self.start + self.count

    def places(self) -> _Places:
        """Return where the keys and values of its tokens are, in order."""
        first = np.array(self.pages, np.int64)[:, None] * PAGE
        return (first + np.arange(PAGE)).reshape(-1)[: self.length]


@dataclass(slots=True, eq=False)
class Group:
    """Sequences that one attention call answers.

    Attributes:
        rows: `[sequences, width]`: the packed row of each query row; padding repeats the last of its sequence.
        positions: `[sequences, width]`: of the query rows in their sequences.
        places: `[sequences, longest]`: of the keys; padding is any place.
        own: `[packed rows]`: those that the call answers, and `answers` the query rows that answer them.
        lowest: First position of all query rows.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    own: torch.Tensor
    answers: torch.Tensor
    lowest: int = field(kw_only=True)
    _masks: dict[tuple[int | None, int, torch.dtype], tuple[int, torch.Tensor]] = field(
        default_factory=dict, init=False
    )

    def mask(self, window: int | None, *, heads: int, dtype: torch.dtype) -> tuple[int, torch.Tensor]:
        """Return which keys each query row sees; made once for all layers with this window.

        Rows are repeated `heads` times: query heads that share a key head. Returns the first key that any row sees, and
        `[sequences, 1, heads * width, keys]` from there on: 0 or minus infinity.
        """
        known = self._masks.get((window, heads, dtype))
        if known is not None:
            return known
        first = 0 if window is None else max(0, self.lowest - window + 1)
        keys = torch.arange(first, self.places.shape[1], device=self.positions.device)
        rows = self.positions.unsqueeze(2)
        hidden = keys > rows
        if window is not None:
            hidden |= keys <= rows - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=keys.device).masked_fill_(hidden, -torch.inf)
        made = first, mask.repeat(1, heads, 1).unsqueeze(1)
        self._masks[window, heads, dtype] = made
        return made


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A step: places of the packed rows' keys and values, positions of the rows, and groups that cover each once."""

    places: torch.Tensor
    positions: torch.Tensor
    groups: tuple[Group, ...]


def lay_out(parts: Sequence[Part], device: torch.device) -> Layout:
    starts = [0, *accumulate(part.count for part in parts)]
    places = [part.places() for part in parts]
    arrays = [
        np.concatenate([each[part.start :] for part, each in zip(parts, places, strict=True)]),
        np.concatenate([np.arange(part.start, part.length) for part in parts]),
    ]
    lowest = []
    for members in _groups(parts):
        chosen = [parts[index] for index in members]
        width, longest = max(part.count for part in chosen), max(part.length for part in chosen)
        steps = [np.minimum(np.arange(width), part.count - 1) for part in chosen]
        gathered = np.zeros((len(chosen), longest), np.int64)
        for line, index in enumerate(members):
            gathered[line, : parts[index].length] = places[index]
        arrays += [
            np.stack([starts[index] + step for index, step in zip(members, steps, strict=True)]),
            np.stack([part.start + step for part, step in zip(chosen, steps, strict=True)]),
            gathered,
            np.concatenate([np.arange(starts[index], starts[index + 1]) for index in members]),
            np.concatenate([line * width + np.arange(part.count) for line, part in enumerate(chosen)]),
        ]
        lowest.append(min(part.start for part in chosen))
    first, second, *rest = send(arrays, device)
    groups = (Group(*rest[5 * at : 5 * at + 5], lowest=each) for at, each in enumerate(lowest))
    return Layout(first, second, tuple(groups))


def send(arrays: Sequence[_Places], device: torch.device) -> list[torch.Tensor]:
    """Return arrays as tensors on a device, sent at once."""
    on_gpu = device.type == "cuda"
    host = torch.from_numpy(np.concatenate([each.reshape(-1) for each in arrays]))
    # A GPU copies from pinned memory asynchronously.
    sent = (host.pin_memory() if on_gpu else host).to(device, non_blocking=on_gpu)
    pieces = torch.split(sent, [each.size for each in arrays])
    return [piece.view(each.shape) for piece, each in zip(pieces, arrays, strict=True)]


def _groups(parts: Sequence[Part]) -> Iterator[list[int]]:
    group: list[int] = []
    for index in sorted(range(len(parts)), key=lambda index: parts[index].length):
        part = parts[index]
        if part.count > FEW_ROWS:
            yield [index]
            continue
        longest = _STRETCH * parts[group[0]].length + _SHORT if group else part.length
        if part.length > longest or (len(group) + 1) * part.length > max(_GATHERED, part.length):
            yield group
            group = []
        group.append(index)
    if group:
        yield group
