"""Target model of a GGUF, and the memory that its sequences take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleet_common.llama import GgufFile, LlamaError, library
from fleet_edge.verifiers.contract import OnProgress, UnsupportedModel, VerifierError, no_progress
from fleet_edge.verifiers.source import check_memory


class GgufTarget(GgufFile):
    error = VerifierError
    key = "target"

    @property
    def name(self) -> str:
        path = self.path.resolve()
        return f"{path.parent.name}/{path.stem}" if path.parent.name else path.stem


def open_target(path: Path, *, gpu_layers: int, on_progress: OnProgress = no_progress) -> GgufTarget:
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
    target = GgufTarget(path, gpu_layers=gpu_layers, on_progress=on_progress)
    kind = target.unlike_a_decoder
    if kind is not None and not target.is_hybrid:
        target.close()
        raise UnsupportedModel(
            f"{path} is a model of the {kind} kind, which cannot remove tokens after a rejected draft; "
            "choose a transformer decoder, or a hybrid of both, as target model."
        )
    return target


CELL_ROUNDING: Final = 256
"""llama.cpp rounds the tokens of a stream up to a multiple of this."""

_BATCH: Final = 512
"""Max tokens of one call: kernels do not gain from more, on GPUs either."""

_MAX_SEQUENCES: Final = 64
_SEQUENCES_WANTED: Final = 16
_LENGTH_WANTED: Final = 4096
"""If the budget does not hold this many sequences of the whole context, they may have at least this many tokens."""

_MAX_ROWS: Final = 320
"""Rows of a call: 64 sequences with drafts of 4. A step with more takes another pass over the weights."""

_MIN_ROWS: Final = 32
"""All tokens of a part that shares its call."""

_ROW_BYTES: Final = 64 << 20
"""Memory for logits of a call, outside the budget; a step of several calls takes as much again."""

_SCORE_BYTES: Final = 64 << 20
"""Memory for attention scores (tokens of a call by cells of a stream), outside the budget too."""

_MIN_BATCH: Final = 64
"""Tokens of a call where that memory is short."""

_SHARED_SCORE_BYTES: Final = 512 << 20
_SHARED_BATCH: Final = 128
"""A hybrid's sequences share their cells, so that scores bound these: the memory for scores, and tokens of a call."""

_STATES_SHARE: Final = 2
"""At most this fraction of a hybrid's budget is for running states, the rest for keys and values."""

_FLOAT32: Final = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """Use of a budget.

    Attributes:
        sequences: Max sequences with computed tokens.
        context: Max tokens of a sequence.
        total: Max tokens of all sequences.
        cells: Tokens of all streams, as llama.cpp rounds them.
        batch: Max tokens of a call.
        rows: Max rows of logits of a call.
    """

    sequences: int
    context: int
    total: int
    cells: int
    batch: int
    rows: int


def size_streams(
    *, budget_bytes: int, token_bytes: int, trained: int, wanted: int, width: int, heads: int
) -> Sizes | None:
    """Return streams of one length within a budget; None if it does not hold a single one.

    `trained` is the model's context, `wanted` the one asked for; 0 for as much as leaves room for several sequences.
    `width` is the row length of the logits, `heads` the query heads of a layer that stores attention scores.
    """
    tokens = budget_bytes // token_bytes
    if tokens < CELL_ROUNDING:
        return None
    # One cell more than the context, so that the last token may be padded too.
    if wanted:
        cells = _rounded_up(min(trained, wanted) + 1)
    else:
        # Rounded down, so that as many as wanted fit in.
        cells = max(tokens // _SEQUENCES_WANTED, min(_LENGTH_WANTED, tokens // 2), CELL_ROUNDING)
        cells = min(cells // CELL_ROUNDING * CELL_ROUNDING, _rounded_up(trained + 1))
    cells = min(cells, tokens // CELL_ROUNDING * CELL_ROUNDING)
    context = min(trained, wanted or trained, cells - 1)
    streams = min(_MAX_SEQUENCES, tokens // cells)
    scores = cells * heads * _FLOAT32  # of a token
    batch = min(_BATCH, streams * cells, max(_MIN_BATCH, _SCORE_BYTES // scores) if scores else _BATCH)
    return Sizes(streams, context, streams * context, streams * cells, batch, _rows(width, batch, streams))


def size_states(
    *, budget_bytes: int, token_bytes: int, state_bytes: int, trained: int, wanted: int, width: int, heads: int
) -> Sizes | None:
    """Return how to use a budget for a hybrid, whose sequences have two running states each, and share their cells."""
    state = 2 * state_bytes
    sequences = max(1, min(_MAX_SEQUENCES, budget_bytes // _STATES_SHARE // max(1, state)))
    cells = min(
        max(0, budget_bytes - sequences * state) // token_bytes,
        sequences * (trained or budget_bytes),
        _SHARED_SCORE_BYTES // (_SHARED_BATCH * heads * _FLOAT32) if heads else budget_bytes,
    )
    cells = cells // CELL_ROUNDING * CELL_ROUNDING
    if not cells:
        return None
    context = min(each for each in (trained, wanted, cells - 1) if each)
    return Sizes(sequences, context, cells - 1, cells, _SHARED_BATCH, _rows(width, _SHARED_BATCH, 2 * sequences))


def _rows(width: int, batch: int, sequences: int) -> int:
    # llama.cpp ends the process if there is not one for each sequence.
    return max(sequences, _MIN_ROWS, min(batch, _MAX_ROWS, _ROW_BYTES // (_FLOAT32 * width)))


def _rounded_up(cells: int) -> int:
    return -(-cells // CELL_ROUNDING) * CELL_ROUNDING
