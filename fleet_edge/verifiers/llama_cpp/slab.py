"""Slab: one llama.cpp context with several streams, each of which holds one sequence's keys and values.

Streams, because in llama.cpp's one shared memory for all sequences each token looks at the cells of all of them: at 16
sequences of 256 tokens a step takes half as long again, at 64 six times as long.
"""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_common.llama import library, native_reason
from fleet_edge.verifiers.contract import CapacityExceeded, UnsupportedModel, VerifierError
from fleet_edge.verifiers.llama_cpp.layout import Call
from fleet_edge.verifiers.llama_cpp.target import GgufTarget

CELL_ROUNDING: Final = 256
"""llama.cpp makes streams of a multiple of so many cells."""

BATCH: Final = 512
"""Most tokens of one call: as large as kernels gain from, on GPUs too."""

_NO_SLOT: Final = 1


@dataclass(frozen=True, slots=True)
class SlabShape:
    """How slabs are made.

    Attributes:
        streams: In each.
        cells: Tokens in a stream, rounded up by llama.cpp.
        rows: Most rows of logits of one call; at least the number of streams.
        tokens: Most of one call; at most `BATCH`.
        threads: Of a call.
    """

    streams: int
    cells: int
    rows: int
    tokens: int
    threads: int


class Slab:
    """Streams of one context. Lengths are the caller's account.

    Raises:
        CapacityExceeded: The machine has no memory for it.
    """

    def __init__(self, target: GgufTarget, shape: SlabShape) -> None:
        self._library = library()
        self.shape = shape
        self._width = target.rows
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = shape.streams * shape.cells
        parameters.n_seq_max = shape.streams
        parameters.kv_unified = False
        parameters.n_batch = parameters.n_ubatch = shape.tokens
        parameters.n_outputs_max = shape.rows
        parameters.n_threads = parameters.n_threads_batch = shape.threads
        # On a processor flash attention looks at one key at a time for each row and head, unless a stream has 64 new
        # tokens: 16 texts of 500 tokens with 5 new ones each take three times as long with it as without.
        parameters.flash_attn_type = (
            self._library.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if target.on_gpu
            else self._library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        # A sliding window that has dropped old keys could not be rolled back.
        parameters.swa_full = True
        parameters.no_perf = True
        native_reason()
        native = self._library.llama_init_from_model(target.handle, parameters)
        if not native:
            raise CapacityExceeded(
                f"llama.cpp has no memory for {shape.streams} texts of {shape.cells} tokens ({native_reason()}); "
                "set a smaller kv_bytes."
            )
        self._native = native
        self._memory = self._library.llama_get_memory(native)
        self._batch = self._library.llama_batch_init(BATCH, 0, 1)
        weakref.finalize(self, _free, self._library, native, self._batch, target)
        view = np.ctypeslib.as_array
        self._tokens = view(self._batch.token, (BATCH,))
        self._positions = view(self._batch.pos, (BATCH,))
        self._outputs = view(self._batch.logits, (BATCH,))
        for index in range(BATCH):
            self._batch.n_seq_id[index] = 1
        self._sequences = [self._batch.seq_id[index] for index in range(BATCH)]

    def decode(
        self, call: Call, *, tokens: Mapping[int, Sequence[int]], starts: Mapping[int, int], rows: Mapping[int, int]
    ) -> NDArray[np.float32]:
        """Compute one call, and take back what fills it up.

        Args:
            call: Which tokens.
            tokens: By stream, its new tokens of the whole step.
            starts: By stream, its length before the step; of all streams in the call.
            rows: By stream, at the last of how many of the step's tokens logits are wanted.

        Returns:
            float32 `[wanted rows in the call, rows of the model]`, streams in order: llama.cpp's own memory, which the
            next call overwrites.

        Raises:
            CapacityExceeded: The machine has no memory for it.
            VerifierError: llama.cpp has failed. In both cases part may have been stored: the caller cuts the streams.
        """
        size = wanted = 0
        for share in call:
            text = tokens.get(share.stream, ())
            first, count = share.first, share.count
            height = count + share.filling
            end = size + height
            self._tokens[size : size + count] = text[first : first + count]
            self._tokens[size + count : end] = 0
            position = starts[share.stream] + first
            self._positions[size:end] = np.arange(position, position + height)
            outputs = share.wanted(len(text), rows.get(share.stream, 0))
            self._outputs[size:end] = 0
            self._outputs[size + count - outputs : size + count] = 1
            wanted += outputs
            for sequence in self._sequences[size:end]:
                sequence[0] = share.stream
            size = end
        self._batch.n_tokens = size
        native_reason()
        status = self._library.llama_decode(self._native, self._batch)
        if status != 0:
            kind = CapacityExceeded if status == _NO_SLOT else VerifierError
            raise kind(f"llama.cpp could not compute a step (status {status}): {native_reason()}.")
        for share in call:
            if share.filling:
                self.cut(share.stream, starts[share.stream] + share.first + share.count)
        if not wanted:
            return np.empty((0, self._width), dtype=np.float32)
        found = self._library.llama_get_logits(self._native)
        if not found:
            raise VerifierError("llama.cpp gave no logits.")
        logits: NDArray[np.float32] = np.ctypeslib.as_array(found, (wanted, self._width))
        return logits

    def cut(self, stream: int, length: int) -> None:
        """Forget what a stream holds from a position on.

        Raises:
            UnsupportedModel: The model takes no tokens back.
        """
        if not self._library.llama_memory_seq_rm(self._memory, stream, length, -1):
            raise UnsupportedModel(
                "This model takes no tokens back, as every rejected draft asks; choose a transformer decoder as target "
                "model."
            )

    def save(self, stream: int) -> "ctypes.Array[ctypes.c_uint8]":
        """Return a copy of what a stream holds, for `restore`; without what lies behind a sliding window."""
        size = self._library.llama_state_seq_get_size(self._native, stream)
        data: ctypes.Array[ctypes.c_uint8] = (ctypes.c_uint8 * size)()
        if self._library.llama_state_seq_get_data(self._native, data, size, stream) != size:
            raise VerifierError(f"llama.cpp could not copy a text: {native_reason()}.")
        return data

    def restore(self, stream: int, data: "ctypes.Array[ctypes.c_uint8]") -> None:
        """Fill an empty stream with what `save` of a slab of the same shape has returned."""
        if not self._library.llama_state_seq_set_data(self._native, data, len(data), stream):
            raise VerifierError(f"llama.cpp could not copy a text: {native_reason()}.")

    def copy(self, source: int, stream: int) -> None:
        """Fill an empty stream with all that another of this slab holds; the next call does so, cell by cell."""
        self._library.llama_memory_seq_cp(self._memory, source, stream, -1, -1)


def _free(native_library: Any, native: Any, batch: Any, _target: GgufTarget) -> None:  # noqa: ANN401 - untyped
    """Free a context; the model that it belongs to is held until then."""
    native_library.llama_batch_free(batch)
    native_library.llama_free(native)
