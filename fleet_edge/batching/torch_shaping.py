"""Batched shaping in torch, as `shaping` does it in numpy, on the device that holds the logits.

Only a bounded support per row is copied to the host, not the vocabulary. The host synchronizes once; no size depends
on a result before that.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fleet_edge.batching.shaping import RowGroup, ShapedRows
from schemas.policy import SamplingPolicy

BLOCK: Final = 64
"""Elements of a block: a few vector registers, and far fewer blocks than elements."""


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest elements of every row, as `shaping.top_k` does.

    One pass finds the largest element of each block; the k largest elements are in k of the blocks, which alone are
    sorted. No size depends on the logits, so the host need not wait for a GPU.
    """
    if k < 1 or logits.dim() != 2 or logits.dtype != torch.float32:  # noqa: PLR2004 - rows and columns
        raise ValueError("top_k wants float32 logits [rows, size] and a k of at least 1.")
    rows, size = logits.shape
    if rows == 0 or k > size // BLOCK:
        values, ids = logits.sort(dim=1, descending=True, stable=True)
        return values[:, :k], ids[:, :k]
    # The first k blocks, by falling maximum and rising number, hold the k largest elements: an element of another block
    # has at least k before it, the maxima of these.
    blocks = _largest(logits).sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    candidates = (blocks.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    values = logits.gather(1, candidates.clamp_max(size - 1))
    if size % BLOCK:
        values.masked_fill_(candidates >= size, -torch.inf)  # the last block is short
    best, order = values.sort(dim=1, descending=True, stable=True)
    return best[:, :k], candidates.gather(1, order[:, :k])


def _largest(logits: torch.Tensor) -> torch.Tensor:
    whole = logits.shape[1] // BLOCK * BLOCK
    parts = [logits[:, :whole].view(len(logits), -1, BLOCK).amax(dim=2)]
    if whole < logits.shape[1]:
        parts.append(logits[:, whole:].amax(dim=1, keepdim=True))
    return torch.cat(parts, dim=1)


def shape_groups(
    logits: torch.Tensor, groups: Sequence[RowGroup], whole: Sequence[int]
) -> tuple[list[ShapedRows], NDArray[np.float32]]:
    """Shape groups of rows, and copy them and the unshaped rows `whole` to the host."""
    found: list[torch.Tensor] = []
    for group in groups:
        rows = (
            logits if len(group.rows) == len(logits) else logits.index_select(0, _to_device(group.rows, logits.device))
        )
        found.extend(_shaped(rows, group.policies, group.support))
    if whole:
        found.append(logits.index_select(0, _to_device(np.array(whole, dtype=np.int64), logits.device)))
    arrays = _to_host(found)
    shaped = [ShapedRows(ids, probs) for ids, probs in zip(arrays[0::2], arrays[1::2], strict=False)]
    return shaped, arrays[-1] if whole else np.empty((0, logits.shape[1]), dtype=np.float32)


def shape_rows(logits: torch.Tensor, policies: Sequence[SamplingPolicy], support: int) -> ShapedRows:
    return ShapedRows(*_to_host(_shaped(logits, policies, support)))


def _shaped(
    logits: torch.Tensor, policies: Sequence[SamplingPolicy], support: int
) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = top_k(logits, support)
    if support == 1:
        return ids, torch.isfinite(values).double()
    columns = _to_device(np.array([[each.temperature, each.top_p, each.min_p] for each in policies]), logits.device)
    temperature, top_p, min_p = columns[:, :1], columns[:, 1:2], columns[:, 2:]
    scores = values.double()
    weights = torch.exp((scores - scores[:, :1]) / temperature)
    weights = torch.where(weights < min_p, 0.0, weights)
    weights /= weights.sum(dim=1, keepdim=True)
    mass_before = torch.cumsum(weights, dim=1).roll(1, dims=1)
    mass_before[:, 0] = 0.0
    weights = torch.where((mass_before < top_p) | (top_p >= 1.0), weights, 0.0)
    weights /= weights.sum(dim=1, keepdim=True)
    return ids, weights.float().double()


def _to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _to_host(tensors: Sequence[torch.Tensor]) -> list[NDArray[Any]]:
    """Copy tensors of one device to the host; the only synchronization."""
    if not any(tensor.device.type == "cuda" for tensor in tensors):
        return [tensor.cpu().numpy() for tensor in tensors]
    hosts = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for host, tensor in zip(hosts, tensors, strict=True):
        host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [host.numpy() for host in hosts]
