"""Slab: a llama.cpp context with several streams, each holding one sequence; and the target model of a GGUF.

In llama.cpp's unified memory each token attends to the cells of all sequences. Without streams, a step with 16
sequences
of 256 tokens takes half as long again, with 64 six times as long.
"""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_common.llama import GgufFile, LlamaError, library, native_reason
from fleet_edge.verifiers.contract import CapacityExceeded, UnsupportedModel, VerifierError
from fleet_edge.verifiers.llama_cpp.layout import Call
from fleet_edge.verifiers.source import check_memory


class GgufTarget(GgufFile):
    error = VerifierError
    key = "target"

    @property
    def name(self) -> str:
        path = self.path.resolve()
        return f"{path.parent.name}/{path.stem}" if path.parent.name else path.stem


def open_target(path: Path, *, gpu_layers: int) -> GgufTarget:
    """Load a target model, with this number of layers on a GPU (-1 for all).

    Raises `UnsupportedModel` if the model cannot be rolled back, `VerifierError` if it cannot be loaded, memory or a
    GPU is missing, or llama.cpp is not installed.
    """
    path = path.expanduser()
    try:
        native = library()
    except LlamaError as error:
        raise VerifierError(str(error)) from None
    if not native.llama_supports_gpu_offload():
        if gpu_layers > 0:
            raise VerifierError(
                f"gpu_layers is {gpu_layers}, but llama.cpp finds no GPU here, or was built for none; install "
                "llama-cpp-python built for yours, as with CMAKE_ARGS=-DGGML_CUDA=on, or leave gpu_layers out."
            )
        # Mapped from a file, weights beyond memory would be read again in every step.
        size = path.stat().st_size if path.is_file() else None
        check_memory(str(path), size, "or use a smaller target model or quantization")
    target = GgufTarget(path, gpu_layers=gpu_layers)
    kind = target.unlike_a_decoder
    if kind is not None and not target.is_hybrid:
        target.close()
        raise UnsupportedModel(
            f"{path} is a model of the {kind} kind, which cannot remove tokens after a rejected draft; "
            "choose a transformer decoder, or a hybrid of both, as target model."
        )
    return target


CELL_ROUNDING: Final = 256
"""llama.cpp rounds streams up to a multiple of this."""

BATCH: Final = 512
"""Most tokens of one call: kernels do not gain from more, on GPUs either."""

_NO_SLOT: Final = 1


@dataclass(frozen=True, slots=True)
class SlabShape:
    """Shape of a slab.

    llama.cpp rounds `cells`, the tokens in a stream, up. `rows`, the most rows of logits of one call, is at least the
    number of streams; `tokens` of one call are at most `BATCH`.
    """

    streams: int
    cells: int
    rows: int
    tokens: int
    threads: int


class LlamaSlab:
    """Streams of one context; the caller keeps their lengths. Raises `CapacityExceeded` if memory is short."""

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
        native = self._library.llama_init_from_model(target.handle, parameters)
        if not native:
            raise CapacityExceeded(
                f"llama.cpp has no memory for {shape.streams} sequences of {shape.cells} tokens ({native_reason()}); "
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
        """Compute one call, and remove its padding.

        Takes, by stream, the new `tokens` and last `rows` with logits of the whole step, and the lengths before it.
        Returns float32 `[wanted rows in the call, rows of the model]`, streams in order: llama.cpp's memory,
        overwritten by the next call. Raises `CapacityExceeded` or `VerifierError`; tokens may have been stored then, so
        the caller cuts the streams.
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
        """Forget a stream's tokens from a position on; raises `UnsupportedModel` if it cannot be rolled back."""
        if not self._library.llama_memory_seq_rm(self._memory, stream, length, -1):
            raise UnsupportedModel(
                "This model cannot remove tokens after a rejected draft; choose a transformer decoder as target model."
            )

    def save(self, stream: int) -> "ctypes.Array[ctypes.c_uint8]":
        """Return a copy of a stream for `restore`, without what lies behind a sliding window."""
        size = self._library.llama_state_seq_get_size(self._native, stream)
        data: ctypes.Array[ctypes.c_uint8] = (ctypes.c_uint8 * size)()
        if self._library.llama_state_seq_get_data(self._native, data, size, stream) != size:
            raise VerifierError(f"llama.cpp could not copy a sequence: {native_reason()}.")
        return data

    def restore(self, stream: int, data: "ctypes.Array[ctypes.c_uint8]") -> None:
        """Fill an empty stream with the result of `save` of a slab of the same shape."""
        if not self._library.llama_state_seq_set_data(self._native, data, len(data), stream):
            raise VerifierError(f"llama.cpp could not copy a sequence: {native_reason()}.")

    def copy(self, source: int, stream: int) -> None:
        """Fill an empty stream with a copy of another of this slab; the next call does the copying."""
        self._library.llama_memory_seq_cp(self._memory, source, stream, -1, -1)


def _free(native_library: Any, native: Any, batch: Any, _target: GgufTarget) -> None:  # noqa: ANN401 - untyped
    """Free a context; keeps its model alive until then."""
    native_library.llama_batch_free(batch)
    native_library.llama_free(native)
