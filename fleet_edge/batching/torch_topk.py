"""The k largest logits of every row of a tensor, exactly and in order, for less than a general selection costs.

A row is cut into blocks, and one pass finds the largest element of each: the k largest elements lie in k of them, which
alone are sorted. Nothing has a size that depends on the logits, so that a processor need not wait for a GPU.
"""

from typing import Final

import torch

BLOCK: Final = 64
"""Elements: a few vector registers, and far fewer blocks than elements."""


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest elements of every row: the head of a stable descending sort.

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
    # By falling maximum, equals by rising number, the first k blocks hold the k largest elements: one that lies in
    # another block has k before it, the maxima of these.
    blocks = _largest(logits).sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    candidates = (blocks.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    values = logits.gather(1, candidates.clamp_max(size - 1))
    if size % BLOCK:
        values.masked_fill_(candidates >= size, -torch.inf)  # the last block is short
    best, order = values.sort(dim=1, descending=True, stable=True)
    return best[:, :k], candidates.gather(1, order[:, :k])


def _largest(logits: torch.Tensor) -> torch.Tensor:
    """Return the largest element of every block, `[rows, blocks]`."""
    whole = logits.shape[1] // BLOCK * BLOCK
    parts = [logits[:, :whole].view(len(logits), -1, BLOCK).amax(dim=2)]
    if whole < logits.shape[1]:
        parts.append(logits[:, whole:].amax(dim=1, keepdim=True))
    return torch.cat(parts, dim=1)
