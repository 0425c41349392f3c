"""Context of llama.cpp for drafting: a sequence for each text at once, a token at a time for most of its life."""

from typing import Any

from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.gguf import GgufModel
from fleet_runtime.llama.library import library, native_reason

__all__ = ["open_context"]


def open_context(
    model: GgufModel,
    *,
    name: str,
    cells: int,
    sequences: int,
    batch: int,
    threads: int,
    flash_attention: bool,
    small_keys: bool = False,
) -> Any:  # noqa: ANN401 - a native pointer
    """Make a context.

    Args:
        model: The draft model.
        name: Its name, for errors.
        cells: Tokens that the memory holds of each sequence.
        sequences: How many there are, each with cells of its own: in common cells, each would be slowed down by all.
        batch: Most tokens computed at once.
        threads: For drafting and prefill.
        flash_attention: Whether to use it. On a processor it looks at one key at a time for each query and head, unless
            64 tokens are computed at once: behind 1,000 tokens the next one then takes twice as long as without it,
            and 24 take seven times as long.
        small_keys: Whether keys are kept in q8_0, in about half of float16's memory.

    Raises:
        DrafterError: llama.cpp cannot make it.
    """
    native = library()
    parameters = native.llama_context_default_params()
    parameters.n_ctx = cells * sequences
    parameters.n_batch = parameters.n_ubatch = batch
    parameters.n_seq_max = sequences
    parameters.kv_unified = False
    parameters.n_threads = parameters.n_threads_batch = threads
    kinds = native.LLAMA_FLASH_ATTN_TYPE_ENABLED, native.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.flash_attn_type = kinds[0] if flash_attention else kinds[1]
    if small_keys:
        parameters.type_k = native.GGML_TYPE_Q8_0
    # A sliding window that has dropped old keys could not be rolled back.
    parameters.swa_full = True
    parameters.no_perf = True
    native_reason()
    context = model.thread.call(native.llama_init_from_model, model.handle, parameters)
    if not context:
        raise DrafterError(
            f"llama.cpp cannot make a context of {cells * sequences} tokens for {name} ({native_reason()}); set a "
            "smaller one, or fewer texts at once."
        )
    return context
