"""llama.cpp's context: the native memory of sequences, and the call that computes tokens."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_common.llama import library, native_reason
from fleet_edge.verifiers.contract import CapacityExceeded, UnsupportedModel, VerifierError
from fleet_edge.verifiers.llama_cpp.layout import StreamSpan
from fleet_edge.verifiers.llama_cpp.target import GgufTarget, Sizes

_NO_SLOT: Final = 1


class NativeContext:
    """Sequences of one context; the caller keeps their lengths.

    Those of a hybrid share their cells, so that copies cost nothing until they are written to. Others have a stream
    each: where they share cells, each token attends to those of all, and a step of 16 sequences of 256 tokens takes
    half as long again.
    """

    def __init__(self, target: GgufTarget, sizes: Sizes, *, sequences: int, threads: int) -> None:
        """Allocate memory for this number of sequences; raises `VerifierError` if there is none."""
        self._library, self._width = library(), target.rows
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max, parameters.kv_unified = sizes.cells, sequences, target.is_hybrid
        parameters.n_batch = parameters.n_ubatch = sizes.batch
        parameters.n_outputs_max = sizes.rows
        parameters.n_threads = parameters.n_threads_batch = threads
        # On a CPU flash attention processes one key at a time for each row and head unless a stream has 64 new tokens:
        # 16 sequences of 500 tokens with 5 new ones each take three times as long with it.
        parameters.flash_attn_type = (
            self._library.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if target.on_gpu
            else self._library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        # A sliding window that has dropped old keys cannot be rolled back.
        parameters.swa_full = True
        parameters.no_perf = True
        native_reason()
        self._native = self._library.llama_init_from_model(target.handle, parameters)
        if not self._native:
            raise VerifierError(
                f"llama.cpp has no memory for {sizes.cells} tokens of {target.name} ({native_reason()}); set a smaller "
                "kv_bytes."
            )
        self._memory = self._library.llama_get_memory(self._native)
        self._batch = self._library.llama_batch_init(sizes.batch, 0, 1)
        weakref.finalize(self, _free, self._library, self._native, self._batch, target)
        view = np.ctypeslib.as_array
        self._tokens = view(self._batch.token, (sizes.batch,))
        self._positions = view(self._batch.pos, (sizes.batch,))
        self._outputs = view(self._batch.logits, (sizes.batch,))
        for index in range(sizes.batch):
            self._batch.n_seq_id[index] = 1
        self._sequences = [self._batch.seq_id[index] for index in range(sizes.batch)]

    def compute(self, call: Sequence[StreamSpan], lengths: Mapping[int, int]) -> NDArray[np.float32]:
        """Compute one call, given the lengths of its sequences.

        Returns float32 `[wanted rows, rows of the model]`, parts in order: llama.cpp's memory, overwritten by the next
        call. Raises `CapacityExceeded` or `VerifierError`; tokens may have been stored then.
        """
        size = wanted = 0
        for part in call:
            count = len(part.tokens)
            end = size + count + part.padding
            self._tokens[size : size + count] = part.tokens
            self._tokens[size + count : end] = 0
            length = lengths[part.stream]
            self._positions[size:end] = np.arange(length, length + end - size)
            self._outputs[size:end] = 0
            self._outputs[size + count - part.rows : size + count] = 1
            for sequence in self._sequences[size:end]:
                sequence[0] = part.stream
            size, wanted = end, wanted + part.rows
        self._batch.n_tokens = size
        native_reason()
        status = self._library.llama_decode(self._native, self._batch)
        if status != 0:
            kind = CapacityExceeded if status == _NO_SLOT else VerifierError
            raise kind(f"llama.cpp could not compute a step (status {status}): {native_reason()}.")
        if not wanted:
            return np.empty((0, self._width), np.float32)
        found = self._library.llama_get_logits(self._native)
        if not found:
            raise VerifierError("llama.cpp gave no logits.")
        return np.ctypeslib.as_array(found, (wanted, self._width))

    def cut(self, sequence: int, length: int) -> None:
        """Remove all tokens from `length` on; raises `UnsupportedModel` if the model cannot be rolled back."""
        if not self._library.llama_memory_seq_rm(self._memory, sequence, length, -1):
            raise UnsupportedModel(
                "This model cannot remove tokens after a rejected draft; choose a transformer decoder as target model."
            )

    def copy(self, source: int, sequence: int) -> None:
        """Fill an empty sequence with a copy of another; the next call does the copying."""
        self._library.llama_memory_seq_cp(self._memory, source, sequence, -1, -1)


def _free(native_library: Any, native: Any, batch: Any, _target: GgufTarget) -> None:  # noqa: ANN401 - untyped
    """Free a context; keeps its model alive until then."""
    native_library.llama_batch_free(batch)
    native_library.llama_free(native)
