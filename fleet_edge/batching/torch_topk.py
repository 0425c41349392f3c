"""Top-k logits of every row of a tensor, exactly and in order, for less than a general selection costs.

A row is cut into blocks, and one pass finds the largest element of each. The k-th largest of those is a lower bound
of the row's k-th largest element: only blocks that reach it are looked into, and only the few elements that reach it
are sorted.
"""

from typing import Final

import torch

__all__ = ["top_k"]

BLOCK: Final = 64
"""Elements: a few vector registers, and far fewer blocks than elements."""


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest elements of every row: the head of a stable descending sort.

    Rows in which very many elements are equal cost as much as that sort.

    Args:
        logits: float32 `[rows, size]`. Minus infinity is allowed; what is not a number comes first.
        k: How many; a row has no more than `size`.

    Returns:
        Values, float32 `[rows, min(k, size)]`, falling, and their ids, int64; of equals the lower id comes first.

    Raises:
        ValueError: `k` is less than 1, or the logits are not float32 rows.
    """
    if k < 1 or logits.dim() != 2 or logits.dtype != torch.float32:  # noqa: PLR2004 - rows and columns
        raise ValueError("top_k wants float32 logits [rows, size] and a k of at least 1.")
    rows, size = logits.shape
    if rows == 0 or k > size // BLOCK:
        values, ids = logits.sort(dim=1, descending=True, stable=True)
        return values[:, :k], ids[:, :k]
    row, ids = _candidates(logits, k)
    values = logits[row, ids]
    # One line a row, in rising order of id, so that the stable sort leaves equals in that order.
    counts = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    lines = values.new_full((rows, int(counts.max())), -torch.inf)
    lines[row, place] = values
    line_ids = ids.new_zeros(lines.shape)
    line_ids[row, place] = ids
    best, order = lines.sort(dim=1, descending=True, stable=True)
    return best[:, :k], line_ids.gather(1, order[:, :k])


def _candidates(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and id, int64 `[candidates]`, of k elements or more a row, the k largest among them; both rise."""
    size = logits.shape[1]
    largest = _largest(logits)
    bound = largest.topk(k, dim=1).values[:, -1:]
    # "Not less" rather than "greater or equal": what is not a number stays a candidate, and as a bound admits all.
    row, block = (~(largest < bound)).nonzero(as_tuple=True)
    ids = block.unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=logits.device)
    values = logits.take(row.unsqueeze(1) * size + ids.clamp_max(size - 1))
    reaches = values.lt(bound[row]).logical_not_()
    if size % BLOCK:
        reaches &= ids < size  # the last block is short
    which, offset = reaches.nonzero(as_tuple=True)
    return row[which], ids[which, offset]


def _largest(logits: torch.Tensor) -> torch.Tensor:
    """Return the largest element of every block, `[rows, blocks]`."""
    whole = logits.shape[1] // BLOCK * BLOCK
    parts = [logits[:, :whole].view(len(logits), -1, BLOCK).amax(dim=2)]
    if whole < logits.shape[1]:
        parts.append(logits[:, whole:].amax(dim=1, keepdim=True))
    return torch.cat(parts, dim=1)
