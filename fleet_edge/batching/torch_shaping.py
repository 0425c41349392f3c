"""Shaping of many rows at once, as `shaping` does it, where the logits are a tensor: on the device that they lie on.

Only what is shaped comes to the processor: a bounded support a row instead of a vocabulary. The processor waits once
for all of it; until then nothing that it asks for depends on a result.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fleet_edge.batching.shaping import ShapedRows
from fleet_edge.batching.torch_topk import top_k
from schemas.policy import SamplingPolicy


class Group(Protocol):
    """Rows whose policies have one bounded support."""

    @property
    def support(self) -> int:
        """Tokens that a policy keeps at most."""

    @property
    def rows(self) -> NDArray[np.int64]: ...

    @property
    def policies(self) -> Sequence[SamplingPolicy]: ...


def shape_groups(
    logits: torch.Tensor, groups: Sequence[Group], whole: Sequence[int]
) -> tuple[list[ShapedRows], NDArray[np.float32]]:
    """Shape groups of rows, and bring them and some whole rows to the processor.

    Args:
        logits: float32 `[rows, vocabulary]`.
        groups: What to shape.
        whole: Rows that are wanted as they are.
    """
    found: list[torch.Tensor] = []
    for group in groups:
        rows = logits if len(group.rows) == len(logits) else logits.index_select(0, _sent(group.rows, logits.device))
        found.extend(_shaped(rows, group.policies, group.support))
    if whole:
        found.append(logits.index_select(0, _sent(np.array(whole, dtype=np.int64), logits.device)))
    arrays = _brought(found)
    shaped = [ShapedRows(ids, probs) for ids, probs in zip(arrays[0::2], arrays[1::2], strict=False)]
    return shaped, arrays[-1] if whole else np.empty((0, logits.shape[1]), dtype=np.float32)


def shape_rows(logits: torch.Tensor, policies: Sequence[SamplingPolicy], support: int) -> ShapedRows:
    return ShapedRows(*_brought(_shaped(logits, policies, support)))


def _shaped(
    logits: torch.Tensor, policies: Sequence[SamplingPolicy], support: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and probabilities, as `ShapedRows` has them."""
    values, ids = top_k(logits, support)
    if support == 1:
        return ids, torch.isfinite(values).double()
    columns = _sent(np.array([[policy.temperature, policy.top_p] for policy in policies]), logits.device)
    temperature, top_p = columns[:, :1], columns[:, 1:]
    scores = values.double()
    weights = torch.exp((scores - scores[:, :1]) / temperature)
    weights /= weights.sum(dim=1, keepdim=True)
    mass_before = torch.cumsum(weights, dim=1).roll(1, dims=1)
    mass_before[:, 0] = 0.0
    weights = torch.where((mass_before < top_p) | (top_p >= 1.0), weights, 0.0)
    weights /= weights.sum(dim=1, keepdim=True)
    return ids, weights.float().double()


def _sent(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an array on the device; the processor does not wait until it is there."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _brought(tensors: Sequence[torch.Tensor]) -> list[NDArray[Any]]:
    """Return tensors of one device as arrays, when all have come: the one time that the processor waits."""
    if not any(tensor.device.type == "cuda" for tensor in tensors):
        return [tensor.cpu().numpy() for tensor in tensors]
    hosts = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for host, tensor in zip(hosts, tensors, strict=True):
        host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [host.numpy() for host in hosts]
