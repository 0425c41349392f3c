"""llama.cpp drafter, on llama.cpp's low-level interface.

The sequence has tokens it *knows* and tokens it has *computed* (their keys and values are stored); `next`
computes the difference. Logits are read where llama.cpp left them and shaped at once: the next decode
overwrites them. What is computed of earlier texts is kept beside it (see `kept_sequences`).
"""

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dssd.distribution import Dist, shape
from fleet_device.drafters.contract import DrafterError, common_prefix, require_tokens
from fleet_device.drafters.gguf import GgufModel
from fleet_device.drafters.kept_sequences import LEAST_KEPT, KeptSequence, KeptSequences, is_other_text
from fleet_device.drafters.llama_context import open_context
from fleet_device.drafters.model_source import locate_model
from fleet_device.drafters.requirements import require_memory, require_truncatable
from fleet_device.settings import DeviceSettings
from fleet_runtime.available_memory import available_memory
from fleet_runtime.llama.library import library, native_reason
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary

__all__ = ["LlamaCppDrafter", "LlamaCppSettings", "load"]

_SEQUENCE = 0
_SPARE = 4  # times as much memory as a copy takes has to be free for it

_MOST_DEFAULT_THREADS = 4  # a draft token is bound by memory: more threads only wait for each other


def default_threads() -> int:
    """Return the number of threads to draft with, from the cores that this process may use."""
    return min(len(os.sched_getaffinity(0)), _MOST_DEFAULT_THREADS)


@dataclass(frozen=True, slots=True)
class LlamaCppSettings:
    """How to run the draft model.

    Attributes:
        path: The GGUF.
        name: For the log; empty for the file's name.
        threads: For drafting and prefill; 0 chooses.
        context: Most tokens in a sequence; the model's own limit bounds it.
        batch: Most tokens computed at once, in prefill.
        gpu_layers: How many layers to put on a GPU; -1 for all.
    """

    path: Path
    name: str = ""
    threads: int = 0
    context: int = 4096
    batch: int = 256
    gpu_layers: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.context < 1 or self.batch < 1 or self.threads < 0:
            raise DrafterError("The draft model's context and batch must be at least 1, its threads at least 0.")


class LlamaCppDrafter:
    """A `Drafter` over a GGUF. Not for use from several threads at once.

    Attributes:
        tokens_computed: Since it was loaded.

    Raises:
        DrafterError: The file cannot be used, or its context does not fit into memory.
    """

    def __init__(self, settings: LlamaCppSettings) -> None:
        self._name = settings.name or settings.path.stem
        self._tokens: list[int] = []
        self._computed = 0
        self.tokens_computed = 0
        self._row_of = -1  # length of the sequence whose last row of logits stands in llama.cpp's buffer
        self._native: Any = None
        self._model = GgufModel(settings.path, gpu_layers=settings.gpu_layers)
        self._library = library()
        try:
            require_truncatable(self._model)
            trained = self._library.llama_model_n_ctx_train(self._model.handle)
            self._context = min(settings.context, trained) if trained > 0 else settings.context
            self._batch_size = min(settings.batch, self._context)
            if settings.gpu_layers == 0:
                require_memory(self._model, self._context)
            self._native = open_context(
                self._model,
                name=self._name,
                cells=self._context,
                batch=self._batch_size,
                threads=settings.threads or default_threads(),
                flash_attention=self._model.on_gpu,
            )
        except DrafterError:
            self._model.close()
            raise
        self._memory = self._library.llama_get_memory(self._native)
        self._kept = KeptSequences(self._context)
        self._window = self._model.window
        self._batch = self._library.llama_batch_init(self._batch_size, 0, 1)
        view = np.ctypeslib.as_array
        self._batch_tokens = view(self._batch.token, (self._batch_size,))
        self._batch_positions = view(self._batch.pos, (self._batch_size,))
        self._batch_outputs = view(self._batch.logits, (self._batch_size,))
        for index in range(self._batch_size):  # one sequence: set for good
            self._batch.n_seq_id[index] = 1
            self._batch.seq_id[index][0] = _SEQUENCE

    @property
    def name(self) -> str:
        """The model's name."""
        return self._name

    @property
    def quantization(self) -> str:
        """The GGUF's file type."""
        return self._model.quantization

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the file, padding rows left out."""
        return self._model.vocabulary

    @property
    def context(self) -> int:
        """Most tokens in the sequence."""
        return self._context

    @property
    def codec(self) -> GgufModel:
        """The file's tokenizer."""
        return self._model

    def reset(self, tokens: Sequence[int]) -> None:
        """Begin a new sequence; what is computed of a prefix of it is taken over, also from an earlier one."""
        require_tokens(tokens, self.vocabulary)
        own = common_prefix(self._tokens[: self._computed], tokens)
        kept, common = self._kept.longest(tokens)
        if kept is not None and common >= own + LEAST_KEPT:
            self._go_back_to(kept, common)
        else:
            if is_other_text(self._computed, own):
                self._put_aside()
            self.truncate(common_prefix(self._tokens, tokens))
        self._tokens[:] = tokens

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens, to be computed by `next`."""
        require_tokens(tokens, self.vocabulary)
        self._tokens.extend(tokens)

    def next(self, policy: SamplingPolicy) -> Dist:
        """Compute what is pending and shape the last row."""
        if self._native is None:
            raise DrafterError("The draft model is closed.")
        length = len(self._tokens)
        if not length:
            raise DrafterError("The draft model has nothing to go on: the sequence is empty.")
        if length > self._context:
            raise DrafterError(f"The draft model's context of {self._context} tokens is full; set a larger one.")
        if self._row_of != length:
            # After a truncation the last token's row is gone, though its keys and values are stored.
            self._forget(min(self._computed, length - 1))
            self._compute()
            self._row_of = length
        row = self._library.llama_get_logits_ith(self._native, -1)
        if not row:
            raise DrafterError("llama.cpp gave no logits.")
        logits = np.ctypeslib.as_array(row, (self._model.rows,))[: self.vocabulary.size]
        try:
            return shape(logits, policy)
        except ValueError as error:
            raise DrafterError(f"The draft model {self._name} computes nonsense: {error}") from error

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        if length >= len(self._tokens):
            return
        del self._tokens[max(length, 0) :]
        self._row_of = -1
        self._forget(len(self._tokens))

    def close(self) -> None:
        """Free the native memory."""
        if self._native is None:
            return
        # The views end before what they look at.
        del self._batch_tokens, self._batch_positions, self._batch_outputs
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._native)
        self._native = None
        self._model.close()

    def _go_back_to(self, kept: KeptSequence, length: int) -> None:
        """Go on from an earlier sequence, of which the first `length` tokens are wanted."""
        self._kept.used(kept, whole=not is_other_text(len(kept.tokens), length))
        self._put_aside()
        self._forget(0)
        self._row_of = -1
        size = len(kept.state)
        if self._library.llama_state_seq_set_data(self._native, kept.state, size, _SEQUENCE) == size:
            self._computed = len(kept.tokens)
            self._forget(length)
        else:
            self._library.llama_memory_clear(self._memory, True)  # noqa: FBT003 - computed anew

    def _put_aside(self) -> None:
        """Keep a copy of what is computed of the present sequence."""
        # Behind a sliding window a copy lacks what a rollback needs.
        if not self._window or self._computed <= self._window:
            self._kept.keep(self._tokens[: self._computed], self._copy)

    def _copy(self) -> Any:  # noqa: ANN401 - an array of bytes
        """Return the keys and values of the present sequence; None where there is no memory for them."""
        size = self._library.llama_state_seq_get_size(self._native, _SEQUENCE)
        free = available_memory()
        if free is not None and _SPARE * size > free:
            return None
        state = (ctypes.c_uint8 * size)()
        return state if self._library.llama_state_seq_get_data(self._native, state, size, _SEQUENCE) == size else None

    def _forget(self, length: int) -> None:
        """Drop the keys and values from `length` on."""
        if self._computed <= length:
            return
        if self._library.llama_memory_seq_rm(self._memory, _SEQUENCE, length, -1):
            self._computed = length
        else:
            # A memory that cannot be cut is emptied; `next` computes the whole sequence again.
            self._library.llama_memory_clear(self._memory, True)  # noqa: FBT003
            self._computed = 0

    def _compute(self) -> None:
        """Store keys and values of all known tokens, and logits for the last."""
        length = len(self._tokens)
        pending = length - self._computed
        # Chunks of one size: llama.cpp takes six times as long for a token in a chunk below 64.
        size = math.ceil(pending / math.ceil(pending / self._batch_size))
        while self._computed < length:
            chunk = self._tokens[self._computed : self._computed + size]
            count = len(chunk)
            self._batch.n_tokens = count
            self._batch_tokens[:count] = chunk
            self._batch_positions[:count] = np.arange(self._computed, self._computed + count)
            self._batch_outputs[:count] = 0
            self._batch_outputs[count - 1] = self._computed + count == length
            status = self._model.thread.call(self._library.llama_decode, self._native, self._batch)
            if status != 0:
                # Part of the chunk may have been stored.
                self._computed += count
                self._forget(self._computed - count)
                raise DrafterError(f"llama.cpp could not go on (status {status}): {native_reason()}.")
            self._computed += count
            self.tokens_computed += count


def load(settings: DeviceSettings) -> LlamaCppDrafter:
    """Load the draft model that the settings name.

    Raises:
        DrafterError: It cannot be found or loaded.
    """
    located = locate_model(settings.model, folder=settings.models_dir)
    return LlamaCppDrafter(
        LlamaCppSettings(
            path=located.path,
            name=located.name,
            threads=settings.threads,
            context=settings.context,
            gpu_layers=settings.gpu_layers,
        )
    )
