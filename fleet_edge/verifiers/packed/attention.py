"""Attention function that is registered with transformers, and the seam behind it.

Every layer of the model calls `attend`; which sequences the rows belong to, and where their keys are, is known
to the *step* that runs. It is a context variable rather than an argument of the model's forward, because not
every architecture passes the arguments it does not know on to its attention layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from fleet_edge.verifiers.contract import UnsupportedModel
from fleet_edge.verifiers.packed.layout import FEW_ROWS, Group, Layout, Write

IMPLEMENTATION: Final = "packed_sequences"
"""Name in transformers' registry. No mask function has this name, so transformers builds no mask."""

_STEP: ContextVar["Step"] = ContextVar("packed step")

# What a model may pass along besides: the step's own numbers in another form.
_HARMLESS: Final = frozenset({"position_ids", "position_embeddings", "cache_position"})


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What one layer asks for.

    Attributes:
        layer: Its index.
        query: `[rows, heads, key_dim]`.
        key: `[rows, kv_heads, key_dim]`.
        value: `[rows, kv_heads, value_dim]`.
        scale: Multiplies the scores.
        window: A token sees this many tokens, itself included; None for all.
        softcap: Scores are squeezed into plus or minus this; None for not.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    window: int | None
    softcap: float | None


class Step(Protocol):
    """One forward pass."""

    def attend(self, call: Call) -> torch.Tensor:
        """Store the new keys and values and return the attention's output, `[rows, heads, value_dim]`."""


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Answer the attention layers of the model that is called inside with `step`."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def register() -> None:
    """Make `attend` known to transformers. Idempotent."""
    AttentionInterface.register(IMPLEMENTATION, attend)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    dropout: float = 0.0,
    **extra: Any,  # noqa: ANN401 - transformers passes on whatever the model's forward was given
) -> tuple[torch.Tensor, None]:
    """Answer one layer, in the form transformers calls it.

    Args:
        module: The attention layer; it MUST know its `layer_idx`.
        query: `[1, heads, rows, key_dim]`.
        key: `[1, kv_heads, rows, key_dim]`.
        value: `[1, kv_heads, rows, value_dim]`.
        attention_mask: MUST be None: a mask of the model's own is something this verifier does not honour.
        scaling: Multiplies the scores; by default one over the root of key_dim.
        sliding_window: See `Call`.
        softcap: See `Call`.
        is_causal: None or True.
        dropout: 0: the model is in evaluation mode.
        extra: What else was passed; tensors that change the result are refused.

    Returns:
        `[1, rows, heads, value_dim]` and no weights.

    Raises:
        UnsupportedModel: The layer asks for something this verifier does not do.
    """
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedModel("Its attention layers are not numbered.")
    if is_causal is False or not getattr(module, "is_causal", True) or dropout:
        raise UnsupportedModel("Its attention looks at later tokens, or drops some at random.")
    own = sorted(name for name, given in extra.items() if _changes_result(name, given))
    if attention_mask is not None:
        own.append("attention_mask")
    if own:
        raise UnsupportedModel(f"Its attention uses {', '.join(own)}, which is not supported here.")
    output = _STEP.get().attend(
        Call(
            layer=layer,
            query=query[0].transpose(0, 1),
            key=key[0].transpose(0, 1),
            value=value[0].transpose(0, 1),
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=sliding_window,
            softcap=softcap,
        )
    )
    return output.unsqueeze(0), None


def _changes_result(name: str, given: object) -> bool:
    """Whether an argument is one that attention would have to honour, such as sinks or a position bias."""
    return isinstance(given, torch.Tensor) and name not in _HARMLESS


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
        stored.transpose(1, 2)[write.slots.tensor, write.places.tensor] = new[write.begin : write.end]


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
    keys = group.slab.keys[call.layer][slots, :, first : group.longest]
    values = group.slab.values[call.layer][slots, :, first : group.longest]
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
