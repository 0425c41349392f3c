"""Shaping of many rows at once, as `shaping` does it, where the logits are a tensor: on the device that they lie on.

Only what is shaped comes to the processor: a bounded support a row instead of a vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fleet_edge.batching.shaping import ShapedRows
from fleet_edge.batching.torch_topk import top_k
from schemas.policy import SamplingPolicy

__all__ = ["shape_rows"]


def shape_rows(logits: torch.Tensor, policies: Sequence[SamplingPolicy], support: int) -> ShapedRows:
    """Shape rows; see `shaping.shape_rows`."""
    values, ids = top_k(logits, support)
    if support == 1:
        return _host(ids, torch.isfinite(values).double())
    columns = torch.tensor([[p.temperature, p.top_p] for p in policies], dtype=torch.float64, device=logits.device)
    temperature, top_p = columns[:, :1], columns[:, 1:]
    scores = values.double()
    weights = torch.exp((scores - scores[:, :1]) / temperature)
    weights /= weights.sum(dim=1, keepdim=True)
    mass_before = torch.cumsum(weights, dim=1).roll(1, dims=1)
    mass_before[:, 0] = 0.0
    weights = torch.where((mass_before < top_p) | (top_p >= 1.0), weights, 0.0)
    weights /= weights.sum(dim=1, keepdim=True)
    return _host(ids, weights.float().double())


def _host(ids: torch.Tensor, probs: torch.Tensor) -> ShapedRows:
    on_host: NDArray[np.int64] = ids.cpu().numpy()
    return ShapedRows(on_host, probs.cpu().numpy())
