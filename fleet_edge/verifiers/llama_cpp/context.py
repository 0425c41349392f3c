"""llama.cpp's context: the native memory of sequences, the calls of a step, and the call that computes tokens.

llama.cpp keeps each sequence in a stream, and computes streams together only if they are neighbours with equally many
new tokens: otherwise it passes over the weights several times. A pass costs as much as some tokens. So the streams of a
step are cut into calls, and those of a call are padded to equally many tokens. Padding comes behind a stream's own
tokens and is removed at once, so no row depends on it.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_common.llama import library, native_reason
from fleet_edge.verifiers.contract import CapacityExceeded, UnsupportedModel, VerifierError
from fleet_edge.verifiers.llama_cpp.target import GgufTarget, Sizes

_ALONE: Final = 32
"""Tokens from which a stream is computed alone: kernels gain nothing from larger batches."""


@dataclass(frozen=True, slots=True)
class StreamSpan:
    """One stream's tokens of a step or a call.

    Attributes:
        rows: Logits wanted at the last `rows` of `tokens`.
        row: Place of the first of them in the step's logits.
        padding: Tokens to compute behind `tokens`.
    """

    stream: int
    tokens: Sequence[int]
    rows: int
    row: int = 0
    padding: int = 0


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Max tokens of a call, and max rows of logits."""

    tokens: int
    rows: int


def pad(
    parts: Sequence[StreamSpan], *, room: Sequence[int], pass_tokens: float, limits: CallLimits, min_tokens: int = 1
) -> list[list[StreamSpan]]:
    """Return the cheapest calls of neighbouring streams, which are padded to equally many tokens.

    `room` has the free cells of all streams: `min_tokens` at least behind all tokens of a part but the last.
    `pass_tokens` is the cost of a pass over the weights, in tokens.
    """
    few = sorted((part for part in parts if len(part.tokens) < _ALONE), key=lambda part: part.stream)
    costs, begins = [0.0], [0]  # of the first streams: the cost of their calls, and where the last of these begins
    for end in range(1, len(few) + 1):
        last, height, rows, best = few[end - 1].stream, min_tokens, 0, (float("inf"), 0)
        for begin in range(end - 1, -1, -1):
            part = few[begin]
            height, rows = max(height, len(part.tokens)), rows + part.rows
            size = (last - part.stream + 1) * height
            fits = size <= limits.tokens and rows <= limits.rows and min(room[part.stream : last + 1]) >= height
            if begin < end - 1 and not fits:
                break
            best = min(best, (costs[begin] + pass_tokens + size, begin))
        costs.append(best[0])
        begins.append(best[1])
    calls, end = list[list[StreamSpan]](), len(few)
    while end:
        calls.append(_padded(few[begins[end] : end], min_tokens))
        end = begins[end]
    # These come last: until then their streams have room for padding.
    alone = [piece for part in parts if len(part.tokens) >= _ALONE for piece in _pieces(part, limits)]
    return calls + [_padded([piece], min_tokens) for piece in alone]


def fill(parts: Sequence[StreamSpan], limits: CallLimits) -> list[list[StreamSpan]]:
    """Return calls with as many whole parts as fit, without padding."""
    calls = list[list[StreamSpan]]()
    tokens = rows = 0
    for piece in (piece for part in parts for piece in _pieces(part, limits)):
        tokens, rows = tokens + len(piece.tokens), rows + piece.rows
        if not calls or tokens > limits.tokens or rows > limits.rows:
            calls.append([])
            tokens, rows = len(piece.tokens), piece.rows
        calls[-1].append(piece)
    return calls


def _padded(parts: Sequence[StreamSpan], min_tokens: int) -> list[StreamSpan]:
    """Pad neighbours to equally many tokens; the streams between them get padding alone."""
    height = max(min_tokens, *(len(part.tokens) for part in parts))
    by_stream = {part.stream: part for part in parts}
    call = [by_stream.get(stream, StreamSpan(stream, (), 0)) for stream in range(parts[0].stream, parts[-1].stream + 1)]
    return [replace(part, padding=height - len(part.tokens)) for part in call]


def _pieces(part: StreamSpan, limits: CallLimits) -> Iterator[StreamSpan]:
    """Cut a part to the limits of a call."""
    begin, row, first = 0, part.row, len(part.tokens) - part.rows
    while begin < len(part.tokens):
        end = min(len(part.tokens), begin + limits.tokens, max(begin, first) + limits.rows)
        rows = max(0, end - max(begin, first))
        yield StreamSpan(part.stream, part.tokens[begin:end], rows, row)
        begin, row = end, row + rows


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
