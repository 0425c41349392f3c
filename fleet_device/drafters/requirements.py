"""Checks whether a model can draft on this machine: truncatable memory, and enough of it."""

from pathlib import Path

from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.gguf import GgufModel
from fleet_device.drafters.memory_plan import ModelSizes

__all__ = ["available_memory", "require_memory", "require_truncatable", "sizes_of"]

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


_MEGA = 1_000_000


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
            f"{free / _MEGA:,.0f} MB are free; set fewer texts at once, or a smaller context."
        )
