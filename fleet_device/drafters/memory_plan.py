"""Memory plan: how large a draft model's context and batch can be within a budget, for all texts at once.

What is counted are keys and values, the buffers that llama.cpp computes in, and the copies of earlier texts. The
weights are not: they are mapped from their file, and come and go with it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.gguf import GgufModel

LEAST_CONTEXT: Final = 64
"""Tokens: with fewer nothing can be asked."""

_SMALLEST_BATCH: Final = 32
_BATCH_SHARE: Final = 4
"""The part of the budget that buffers may take, if a smaller batch helps: long prompts take longer with it."""

_FREE_SHARE: Final = 2
"""The part of what is free that a device takes if nobody says how much: others want some too."""

_SMALL_KEYS: Final = (34 / 32 + 2) / (2 + 2)
"""Keys in q8_0 (34 bytes for 32) and values in float16, beside both in float16. Values in q8_0 would need flash
attention, which is slow on a processor."""

_MEGA: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What of a model decides on its memory.

    Attributes:
        token_kv_bytes: A token's keys and values in float16.
        rows: Logits of a token.
        width: Of a token's state.
        heads: Of queries.
        key_width: Of a key of one head.
    """

    token_kv_bytes: int
    rows: int
    width: int
    heads: int
    key_width: int

    @property
    def batch_token_bytes(self) -> int:
        """Bytes of llama.cpp's buffers for each token of a batch, its scores over the context left out."""
        return 4 * self.rows + 16 * self.width


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of a context.

    Attributes:
        context: Tokens of each sequence.
        batch: Most tokens computed at once.
        small_keys: Whether keys are kept in q8_0.
        kept: Tokens of earlier texts, of which copies are kept.
        needed: Bytes, the copies left out.
    """

    context: int
    batch: int
    small_keys: bool
    kept: int
    needed: int


def automatic_budget(free: int | None, file_bytes: int) -> int | None:
    """Return the budget (bytes) where nobody says one: half of what is free beside the model's file; None for any.

    Args:
        free: Bytes that can be taken; None where the system does not say.
        file_bytes: The model's.
    """
    return None if free is None else max(0, free - file_bytes) // _FREE_SHARE


def plan_memory(sizes: ModelSizes, *, context: int, batch: int, sequences: int, budget: int | None) -> MemoryPlan:
    """Return the largest context up to the one that is wanted, and the largest batch, that fit.

    Where not all of the context fits, keys are kept in half the size, if the model allows that.

    Args:
        sizes: Of the model.
        context: Tokens of each sequence that are wanted.
        batch: Tokens at once that are wanted.
        sequences: How many there are.
        budget: Bytes; None for as many as it takes.

    Raises:
        DrafterError: Not even the least context fits.
    """
    batch = min(batch, context)
    if budget is None:
        return _plan(sizes, context, batch, sequences, small_keys=False, budget=None)
    while batch > _SMALLEST_BATCH and batch * sizes.batch_token_bytes * _BATCH_SHARE > budget:
        batch = max(_SMALLEST_BATCH, batch // 2)
    fitting = _fitting(sizes, batch, sequences, budget=budget, small_keys=False)
    small_keys = fitting < context and sizes.key_width % 32 == 0
    if small_keys:
        fitting = _fitting(sizes, batch, sequences, budget=budget, small_keys=True)
    if fitting < min(context, LEAST_CONTEXT):
        least = _plan(sizes, min(context, LEAST_CONTEXT), batch, sequences, small_keys=small_keys, budget=budget).needed
        several, fewer = "", ""
        if sequences > 1:
            several, fewer = f" for each of {sequences} sequences", f"set 'texts_at_once' below {sequences}, "
        raise DrafterError(
            f"The draft model needs {least / _MEGA:,.0f} MB of memory for a context of {min(context, LEAST_CONTEXT)} "
            f"tokens{several}, and may take {budget / _MEGA:,.0f} MB; raise 'memory_mb', {fewer}or "
            'draft without a model (drafter = "suffix" or "none").'
        )
    return _plan(sizes, min(context, fitting), batch, sequences, small_keys=small_keys, budget=budget)


def _token_bytes(sizes: ModelSizes, *, small_keys: bool) -> float:
    return sizes.token_kv_bytes * (_SMALL_KEYS if small_keys else 1.0)


def _fitting(sizes: ModelSizes, batch: int, sequences: int, *, budget: int, small_keys: bool) -> int:
    """Return the tokens of a context that fit."""
    left = budget - batch * sizes.batch_token_bytes
    # Scores of a batch over one sequence are computed in a buffer too.
    each = sequences * _token_bytes(sizes, small_keys=small_keys) + 4 * batch * sizes.heads
    return max(0, int(left / each))


def _plan(
    sizes: ModelSizes, context: int, batch: int, sequences: int, *, small_keys: bool, budget: int | None
) -> MemoryPlan:
    token = _token_bytes(sizes, small_keys=small_keys)
    buffers = batch * (sizes.batch_token_bytes + 4 * sizes.heads * context)
    needed = int(sequences * context * token) + buffers
    kept = context if budget is None else min(context, max(0, int((budget - needed) / token)))
    return MemoryPlan(context, min(batch, context), small_keys, kept, needed)


_MEMINFO = Path("/proc/meminfo")


def available_memory(meminfo: Path = _MEMINFO) -> int | None:
    """Return the bytes that can be had without swapping, or None where the system does not tell."""
    try:
        for line in meminfo.read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            if key == "MemAvailable":
                return int(value.split()[0]) << 10
    except (OSError, ValueError, IndexError):
        return None
    return None


def sizes_of(model: GgufModel) -> ModelSizes:
    """Return what of a model decides on its memory."""
    return ModelSizes(
        token_kv_bytes=model.token_kv_bytes,
        rows=model.rows,
        width=model.width,
        heads=model.heads,
        key_width=model.key_width,
    )


def require_truncatable(model: GgufModel) -> None:
    """Refuse models whose memory is a running state: every rejection would compute all again.

    Raises:
        DrafterError: The model is of such a kind.
    """
    kind = model.unlike_a_decoder
    if kind is not None:
        raise DrafterError(
            f"{model.path} is a model of the {kind} kind, which cannot take tokens back; choose a "
            "transformer decoder as draft model."
        )


def require_memory(model: GgufModel, context: int, *, sequences: int = 1) -> None:
    """Refuse a context whose keys and values do not fit, before the system kills the process for it.

    Args:
        model: The draft model.
        context: Tokens of each sequence.
        sequences: How many there are.

    Raises:
        DrafterError: There is too little memory.
    """
    needed = sequences * context * model.token_kv_bytes
    free = available_memory()
    if free is not None and needed > free:
        raise DrafterError(
            f"A context of {context} tokens for {model.path} needs {needed / _MEGA:,.0f} MB of memory, "
            f"{free / _MEGA:,.0f} MB are free; set a smaller context."
            if sequences == 1
            else f"{sequences} contexts of {context} tokens for {model.path} need {needed / _MEGA:,.0f} MB of memory, "
            f"{free / _MEGA:,.0f} MB are free; set 'texts_at_once' below {sequences}, or a smaller context."
        )
