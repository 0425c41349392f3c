"""Packed step: one forward pass as an attention layer sees it; stores the new keys, attends to all."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from fleet_edge.verifiers.packed.attention import Call
from fleet_edge.verifiers.packed.layout import FEW_ROWS, Group, Layout, Write

__all__ = ["PackedStep"]

SCORES = 1 << 24
"""Most scores in memory at once where they are made explicit (soft caps only): 64 MiB in float32. Elsewhere
torch's kernel works in blocks, and a sequence with many new tokens costs its mask alone: rows * context."""


class PackedStep:
    """The step that `attention.attend` finds in the forward's arguments."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def attend(self, call: Call) -> torch.Tensor:
        """Store the new keys and values and return the output, `[rows, heads, value_dim]`."""
        for write in self._layout.writes:
            _store(write, call)
        rows, heads = call.query.shape[:2]
        output = call.query.new_empty(rows, heads, call.value.shape[-1])
        for group in self._layout.groups:
            output[group.begin : group.end] = _answer(group, call)
        return output


def _store(write: Write, call: Call) -> None:
    for stored, new in (
        (write.slab.keys[call.layer], call.key),
        (write.slab.values[call.layer], call.value),
    ):
        stored.flatten(0, 1).index_copy_(0, write.places.tensor, new[write.begin : write.end])


def _answer(group: Group, call: Call) -> torch.Tensor:
    """Return a group's output, `[end - begin, heads, value_dim]`."""
    kv_heads = call.key.shape[1]
    shared = call.query.shape[1] // kv_heads  # query heads that share a key head
    n, width = group.sequences, group.width
    query = call.query[group.begin : group.end]
    if group.gather is not None:
        query = query.index_select(0, group.gather.tensor)
    query = query.reshape(n, width, kv_heads, shared, -1)
    if width > FEW_ROWS:
        # Prefill: one sequence, and its heads are the batch; the mask need not be repeated.
        query = query[0].permute(2, 1, 0, 3)  # [shared, kv_heads, width, dim]
        first, mask = group.mask(call.window, heads=1, dtype=query.dtype)
    else:
        query = query.permute(0, 2, 3, 1, 4).reshape(n, kv_heads, shared * width, -1)
        first, mask = group.mask(call.window, heads=shared, dtype=query.dtype)
    slots = slice(group.first, group.first + n)
    keys = group.slab.keys[call.layer][slots, first : group.longest].transpose(1, 2)
    values = group.slab.values[call.layer][slots, first : group.longest].transpose(1, 2)
    batch = query.shape[0]  # [batch, kv_heads, keys, dim] from here on
    keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
    if call.softcap is None:
        found = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=call.scale)
    else:
        found = _capped(query, keys, values, mask, scale=call.scale, softcap=call.softcap)
    if width > FEW_ROWS:
        return found.permute(2, 1, 0, 3).reshape(width, kv_heads * shared, -1)
    found = found.view(n, kv_heads, shared, width, -1).permute(0, 3, 1, 2, 4)
    found = found.reshape(n * width, kv_heads * shared, -1)
    return found if group.scatter is None else found.index_select(0, group.scatter.tensor)


def _capped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attention with capped scores, a bounded number of query rows at a time."""
    batch, kv_heads, rows, _ = query.shape
    at_once = max(1, SCORES // (batch * kv_heads * keys.shape[2]))
    pieces = []
    for begin in range(0, rows, at_once):
        piece = slice(begin, begin + at_once)
        scores = torch.matmul(query[:, :, piece], keys.transpose(2, 3)) * scale
        scores = torch.tanh(scores / softcap) * softcap + mask[:, :, piece]
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        pieces.append(torch.matmul(weights, values))
    return torch.cat(pieces, dim=2)
