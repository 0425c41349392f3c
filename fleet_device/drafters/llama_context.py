"""Context of llama.cpp for drafting: one memory, which all sequences of a device share."""

from typing import Any

from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.gguf import GgufModel
from fleet_runtime.llama.library import library, native_reason

__all__ = ["open_context"]


def open_context(model: GgufModel, *, name: str, cells: int, batch: int, threads: int, sequences: int) -> Any:  # noqa: ANN401 - a native pointer
    """Make a context.

    Args:
        model: The draft model.
        name: Its name, for errors.
        cells: Tokens that the memory holds, of all sequences together; those that begin alike share what they share.
        batch: Most tokens computed at once.
        threads: For drafting and prefill.
        sequences: Most of them at a time.

    Raises:
        DrafterError: llama.cpp cannot make it.
    """
    native = library()
    parameters = native.llama_context_default_params()
    parameters.n_ctx = cells
    parameters.n_batch = parameters.n_ubatch = batch
    parameters.n_seq_max = sequences
    parameters.kv_unified = True
    parameters.n_threads = parameters.n_threads_batch = threads
    # With it, tokens computed one at a time and in chunks below 64 give the same logits to the bit in most
    # quantizations, and nearly the same in larger chunks; without it they are far apart.
    parameters.flash_attn_type = native.LLAMA_FLASH_ATTN_TYPE_ENABLED
    # A sliding window that has dropped old keys could not be rolled back.
    parameters.swa_full = True
    parameters.no_perf = True
    native_reason()
    context = native.llama_init_from_model(model.handle, parameters)
    if not context:
        raise DrafterError(
            f"llama.cpp cannot make a context of {cells} tokens for {name} ({native_reason()}); set a smaller one."
        )
    return context
