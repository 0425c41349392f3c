"""llama.cpp drafter, on llama.cpp's low-level interface.

The sequence has tokens that it *knows* and tokens that it has *computed* (their keys and values are stored); `next`
computes the difference. Logits are read where llama.cpp left them and shaped at once: the next decode overwrites them.
What is computed of earlier sequences is kept (see `KeptSequences`).

Concurrent requests have a sequence each in one context and take turns, of a token or a chunk of a prompt. (Computed
together they would not be faster: a small model on a CPU is bound by arithmetic from two tokens on.)
"""

import ctypes
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from fleet_common.host import available_memory
from fleet_common.llama import FairLock, give_back_mapped, library, native_reason
from fleet_common.llama_trial import require_trial
from fleet_device.drafters.contract import DrafterError, common_prefix, require_tokens
from fleet_device.drafters.model_file import (
    GgufModel,
    automatic_budget,
    fit_memory,
    locate_model,
    require_memory,
    require_truncatable,
)
from fleet_device.settings import AUTO, DeviceSettings
from sampling.distribution import Dist, Ids, shape
from schemas.policy import SamplingPolicy


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
    checkpoints: int = 0,
) -> Any:  # noqa: ANN401 - a native pointer
    """Make a context of `cells` tokens for each of the sequences; raise DrafterError if llama.cpp cannot.

    Each sequence has its own cells: shared ones would slow down each by all. Flash attention on a CPU looks at one key
    at a time for each query and head, unless 64 tokens are computed at once: behind 1,000 tokens the next one then
    takes twice as long as without it, and 24 take seven times as long. `small_keys` keeps keys in q8_0, in about half
    of float16's memory. `checkpoints` are further sequences without cells of their own, for copies of the first.
    """
    native = library()
    parameters = native.llama_context_default_params()
    parameters.n_ctx = cells * sequences
    parameters.n_batch = parameters.n_ubatch = batch
    parameters.n_seq_max = sequences + checkpoints
    parameters.kv_unified = checkpoints > 0  # a copy shares the cells
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
            "smaller one, or fewer requests at once."
        )
    return context


MAX_KEPT: Final = 8
"""Sequences in addition to the present one; a device remembers the tokens of as many conversations."""

MIN_KEPT: Final = 16
"""Fewest tokens worth reusing: computing fewer costs about as much as the bookkeeping."""

_TAIL: Final = 64
"""Drafted and rejected tokens that a sequence may have when a conversation goes on."""


def is_worth_keeping(computed: int, common: int) -> bool:
    """Keep a sequence that has more beyond the tokens in common with a new one than is cheap to compute again."""
    behind = computed - common
    return behind > _TAIL or (behind >= MIN_KEPT and behind > common)


@dataclass(frozen=True, slots=True, eq=False)
class KeptSequence:
    tokens: tuple[int, ...]
    state: Any


class KeptSequences:
    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._kept: list[KeptSequence] = []  # the one unused for longest first

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def tokens(self) -> int:
        return sum(len(kept.tokens) for kept in self._kept)

    def longest(self, tokens: Sequence[int]) -> tuple[KeptSequence | None, int]:
        """Return the sequence with the longest common prefix, and its length."""
        best, found = 0, None
        for kept in self._kept:
            common = common_prefix(kept.tokens, tokens)
            if common > best:
                best, found = common, kept
        return found, best

    def keep(self, tokens: Sequence[int], copy: Callable[[], Any]) -> None:
        """Add a sequence unless another one contains it; the least recently used make room. `copy` may return None."""
        kept = tuple(tokens)
        if not MIN_KEPT <= len(kept) <= self._max_tokens:
            return
        if any(each.tokens[: len(kept)] == kept for each in self._kept):
            return
        self._kept = [each for each in self._kept if kept[: len(each.tokens)] != each.tokens]
        while self._kept and (len(self) >= MAX_KEPT or self.tokens + len(kept) > self._max_tokens):
            del self._kept[0]
        state = copy()
        if state is not None:
            self._kept.append(KeptSequence(kept, state))

    def used(self, kept: KeptSequence, *, whole: bool) -> None:
        """Record that a sequence was continued; if all of it was, it need not be kept."""
        self._kept.remove(kept)
        if not whole:
            self._kept.append(kept)


_CHECKPOINTS: Final = 10
"""Copies of a running state: those before each token of a draft of usual length, and of the one behind it."""


class Checkpoints:
    """Places of sequence 0 to which a model with a running state can go back: llama.cpp cannot take back a token.

    Each is a copy of the sequence that shares its keys and values. `sequences` are those of the copies.
    """

    def __init__(self, library: Any, memory: Any, sequences: Sequence[int]) -> None:  # noqa: ANN401 - native
        self._library, self._memory = library, memory
        self._free = list(sequences)
        self._kept: dict[int, int] = {}  # sequence by length, in order

    def keep(self, length: int) -> None:
        """Keep the present state, which has `length` tokens; the oldest but one makes room."""
        if not self._kept and not self._free:
            return
        if length not in self._kept:
            if not self._free:
                self._drop(sorted(self._kept)[1])
            sequence = self._kept[length] = self._free.pop()
            self._library.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)

    def go_back(self, length: int) -> int:
        """Restore the latest state of at most `length` tokens; return its length, 0 if the sequence is empty."""
        for later in [each for each in self._kept if each > length]:
            self._drop(later)
        best = max(self._kept, default=0)
        self._library.llama_memory_seq_rm(self._memory, 0, -1, -1)
        if best:
            self._library.llama_memory_seq_cp(self._memory, self._kept[best], 0, -1, -1)
        return best

    def clear(self) -> None:
        for length in list(self._kept):
            self._drop(length)

    def _drop(self, length: int) -> None:
        sequence = self._kept.pop(length)
        self._library.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        self._free.append(sequence)


_log = logging.getLogger(__name__)

_MEGA = 1_000_000
_SPARE = 4  # times as much memory as a copy takes has to be free for it

_MAX_DEFAULT_THREADS = 4  # a draft token is bound by memory: more threads only wait for each other


def default_threads() -> int:
    return min(len(os.sched_getaffinity(0)), _MAX_DEFAULT_THREADS)


@dataclass(frozen=True, slots=True)
class LlamaCppSettings:
    """Settings of llama.cpp for the draft model.

    Attributes:
        name: For the log; empty for the file's name.
        gpu_layers: Number of layers on a GPU; -1 for all.
        memory_bytes: Most memory for keys, values and buffers: context and batch become smaller to fit. None for no
            bound but what is free: a context that does not fit is refused.
    """

    path: Path
    name: str = ""
    threads: int = 0
    context: int = 4096
    batch: int = 128  # llama.cpp's buffers grow with it, and no prompt is computed faster with more
    gpu_layers: int = 0
    sequences: int = 1
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.context < 1 or self.batch < 1 or self.sequences < 1 or self.threads < 0:
            raise DrafterError(
                "The draft model's context, batch and sequences must be at least 1, its threads at least 0."
            )


class _Native:
    """llama.cpp's model and context, shared by all sequences, and the batch that is computed at a time.

    Attributes:
        turns: Held while llama.cpp is called with the context.
        row_of: The sequence whose last row of logits is in llama.cpp's buffer, and its length then.
    """

    def __init__(self, settings: LlamaCppSettings) -> None:
        self.name = settings.name or settings.path.stem
        self.handle: Any = None
        self.turns = FairLock()
        self.row_of: tuple[int, int] | None = None
        self.left, self.sequences = 1, settings.sequences
        self.model = GgufModel(settings.path, gpu_layers=settings.gpu_layers)
        self.library = library()
        try:
            require_truncatable(self.model)
            copies = _CHECKPOINTS if self.model.is_hybrid else 0
            if copies:
                self.sequences = 1
            states = (copies + 1) * self.model.state_bytes
            budget = settings.memory_bytes and max(0, settings.memory_bytes - states)
            trained = self.library.llama_model_n_ctx_train(self.model.handle)
            wanted = min(settings.context, trained) if trained > 0 else settings.context
            memory = fit_memory(
                self.model,
                context=wanted,
                batch=settings.batch,
                sequences=self.sequences,
                budget=budget,
            )
            self.context, self.batch_size = memory.context, memory.batch
            if settings.gpu_layers == 0:
                require_memory(self.model, self.context, sequences=self.sequences)
            if self.context < wanted:
                _log.warning(
                    "The draft model's context is %d tokens instead of %d: more do not fit into %.0f MB of memory. "
                    "Raise 'memory_mb'%s.",
                    self.context,
                    wanted,
                    (settings.memory_bytes or 0) / 1e6,
                    "" if self.sequences == 1 else f", or set 'requests_at_once' below {self.sequences}",
                )
            self.handle = open_context(
                self.model,
                name=self.name,
                cells=self.context,
                sequences=self.sequences,
                batch=self.batch_size,
                threads=settings.threads or default_threads(),
                flash_attention=self.model.on_gpu,
                small_keys=memory.small_keys,
                checkpoints=copies,
            )
        except DrafterError:
            self.model.close()
            raise
        self.memory = self.library.llama_get_memory(self.handle)
        self.checkpoints = Checkpoints(self.library, self.memory, range(1, copies + 1)) if copies else None
        self.kept = KeptSequences(memory.kept)
        # Weights that llama.cpp has repacked for this CPU are not read from the file again.
        give_back_mapped(settings.path)
        self._batch = self.library.llama_batch_init(self.batch_size, 0, 1)
        view = np.ctypeslib.as_array
        self._tokens = view(self._batch.token, (self.batch_size,))
        self._positions = view(self._batch.pos, (self.batch_size,))
        self._outputs = view(self._batch.logits, (self.batch_size,))
        for index in range(self.batch_size):
            self._batch.n_seq_id[index] = 1

    def compute(self, sequence: int, tokens: Sequence[int], *, position: int, row: bool) -> int:
        """Store keys and values of at most a batch of tokens, with `row` also the last logits; return the status."""
        count = len(tokens)
        self.row_of = None
        self._batch.n_tokens = count
        self._tokens[:count] = tokens
        self._positions[:count] = np.arange(position, position + count)
        self._outputs[:count] = 0
        self._outputs[count - 1] = row
        for index in range(count):
            self._batch.seq_id[index][0] = sequence
        return int(self.model.thread.call(self.library.llama_decode, self.handle, self._batch))

    def clear(self, sequence: int) -> None:
        """Forget a whole sequence, where its memory cannot be cut."""
        if self.checkpoints is not None:
            self.checkpoints.clear()
        if self.sequences == 1 or not self.library.llama_memory_seq_rm(self.memory, sequence, -1, -1):
            self.library.llama_memory_clear(self.memory, True)  # noqa: FBT003

    def close(self) -> None:
        with self.turns:
            if self.handle is None:
                return
            # The views must end before their memory.
            del self._tokens, self._positions, self._outputs
            self.library.llama_batch_free(self._batch)
            self.library.llama_free(self.handle)
            self.handle = None
            self.model.close()


class LlamaCppDrafter:
    """A `Drafter` over a GGUF. Different threads may use different sequences at once."""

    def __init__(self, settings: LlamaCppSettings, *, first: "LlamaCppDrafter | None" = None) -> None:
        self._settings = settings
        self._tokens: list[int] = []
        self._computed = 0
        self.tokens_computed = 0
        self._sequence, self._owns = 0, first is None
        self._native: _Native = first._native if first is not None else _Native(settings)  # noqa: SLF001 - its kind
        if first is not None:
            self._sequence = self._native.left
            self._native.left += 1
        self._library, self._model = self._native.library, self._native.model
        self.name, self.context = self._native.name, self._native.context
        self.codec, self.vocabulary = self._model, self._model.vocabulary
        self.quantization = self._model.quantization
        self._kept = self._native.kept
        self._window = self._model.window

    def another(self) -> "LlamaCppDrafter | None":
        """Return a further sequence; None once there are as many as the settings say."""
        if self._native.left >= self._native.sequences:
            return None
        return LlamaCppDrafter(self._settings, first=self)

    def known(self, tokens: Sequence[int]) -> int:
        return common_prefix(self._tokens[: self._computed], tokens)

    def reset(self, tokens: Sequence[int]) -> None:
        """Begin a new sequence; a computed prefix of it is reused, also that of an earlier sequence."""
        require_tokens(tokens, self.vocabulary)
        with self._native.turns:
            own = self.known(tokens)
            kept, common = self._kept.longest(tokens)
            if kept is not None and self._native.checkpoints and common < len(kept.tokens):
                kept = None  # it cannot be cut
            if kept is not None and common >= own + MIN_KEPT:
                self._go_back_to(kept, common)
            else:
                if is_worth_keeping(self._computed, own):
                    self._keep_copy()
                self._cut(common_prefix(self._tokens, tokens))
            self._tokens[:] = tokens

    def extend(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self.vocabulary)
        self._tokens.extend(tokens)

    def next(self, policy: SamplingPolicy) -> Dist:
        return self._next(policy)

    def next_allowed(self, policy: SamplingPolicy, allowed: Ids) -> Dist:
        return self._next(policy, allowed)

    def _next(self, policy: SamplingPolicy, allowed: Ids | None = None) -> Dist:
        native, length = self._native, len(self._tokens)
        if not length:
            raise DrafterError("The draft model needs at least one token: the sequence is empty.")
        if length > native.context:
            raise DrafterError(f"The draft model's context of {native.context} tokens is full; set a larger one.")
        # Chunks of one size: llama.cpp takes six times as long for a token in a chunk below 64.
        pending = max(1, length - self._computed)
        size = math.ceil(pending / math.ceil(pending / native.batch_size))
        while self._computed + size < length:
            with native.turns:
                self._compute(size)
        with native.turns:
            self._require_open()
            if native.row_of != (self._sequence, length):
                # After a truncation the last token's row is gone, though its keys and values are stored.
                self._forget(min(self._computed, length - 1))
                self._compute(length - self._computed)
                native.row_of = self._sequence, length
                if native.checkpoints is not None:
                    native.checkpoints.keep(self._computed)
            row = self._library.llama_get_logits_ith(native.handle, -1)
            if not row:
                raise DrafterError("llama.cpp gave no logits.")
            # Within the turn: the next computation overwrites the row.
            logits = np.ctypeslib.as_array(row, (self._model.rows,))[: self.vocabulary.size]
            try:
                return shape(logits, policy, allowed=allowed)
            except ValueError as error:
                raise DrafterError(f"The draft model {native.name} computes invalid values: {error}") from error

    def truncate(self, length: int) -> None:
        if length < len(self._tokens):
            with self._native.turns:
                self._cut(length)

    def close(self) -> None:
        """Free the native memory of all sequences; a sequence of `another` is freed with the first."""
        if self._owns:
            self._native.close()

    def _require_open(self) -> None:
        if self._native.handle is None:
            raise DrafterError("The draft model is closed.")

    # The methods below are called while it is this sequence's turn.

    def _cut(self, length: int) -> None:
        if length >= len(self._tokens):
            return
        del self._tokens[max(length, 0) :]
        if self._native.row_of is not None and self._native.row_of[0] == self._sequence:
            self._native.row_of = None
        self._forget(len(self._tokens))

    def _go_back_to(self, kept: KeptSequence, length: int) -> None:
        """Continue an earlier sequence, of which the first `length` tokens are wanted."""
        native = self._native
        self._kept.used(kept, whole=not is_worth_keeping(len(kept.tokens), length))
        self._keep_copy()
        self._forget(0)
        native.row_of = None
        size = len(kept.state)
        if self._library.llama_state_seq_set_data(native.handle, kept.state, size, self._sequence) == size:
            self._computed = len(kept.tokens)
            if native.checkpoints is not None:
                native.checkpoints.keep(self._computed)
            self._forget(length)
        else:
            native.clear(self._sequence)  # computed again

    def _keep_copy(self) -> None:
        # Behind a sliding window a copy lacks what a rollback needs.
        if not self._window or self._computed <= self._window:
            self._kept.keep(self._tokens[: self._computed], self._copy)

    def _copy(self) -> Any:  # noqa: ANN401 - an array of bytes
        """Return keys and values of the sequence; None where memory is short."""
        handle, sequence = self._native.handle, self._sequence
        size = self._library.llama_state_seq_get_size(handle, sequence)
        free = available_memory()
        if free is not None and _SPARE * size > free:
            return None
        state = (ctypes.c_uint8 * size)()
        return state if self._library.llama_state_seq_get_data(handle, state, size, sequence) == size else None

    def _forget(self, length: int) -> None:
        if self._computed <= length:
            return
        self._require_open()
        if self._native.checkpoints is not None:
            self._computed = self._native.checkpoints.go_back(length)
        elif self._library.llama_memory_seq_rm(self._native.memory, self._sequence, length, -1):
            self._computed = length
        else:
            # A memory that cannot be cut is emptied; `next` computes the whole sequence again.
            self._native.clear(self._sequence)
            self._computed = 0

    def _compute(self, most: int) -> None:
        """Store keys and values of at most `most` known tokens, and logits for the last of all."""
        self._require_open()
        length, size = len(self._tokens), min(most, self._native.batch_size)
        end = min(length, self._computed + most)
        while self._computed < end:
            chunk = self._tokens[self._computed : min(end, self._computed + size)]
            last = self._computed + len(chunk) == length
            status = self._native.compute(self._sequence, chunk, position=self._computed, row=last)
            self._computed += len(chunk)
            if status != 0:
                # Part of the chunk may have been stored.
                self._forget(self._computed - len(chunk))
                raise DrafterError(f"llama.cpp failed (status {status}): {native_reason()}.")
            self.tokens_computed += len(chunk)


def load(settings: DeviceSettings) -> LlamaCppDrafter:
    """Load the draft model that the settings name; raise DrafterError."""
    located = locate_model(settings.model, folder=settings.models_dir)
    require_trial(located.path, error=DrafterError)
    if settings.memory_mb == AUTO:
        budget = automatic_budget(available_memory(), located.path.stat().st_size) if not settings.gpu_layers else None
    else:
        budget = settings.memory_mb * _MEGA
    return LlamaCppDrafter(
        LlamaCppSettings(
            path=located.path,
            name=located.name,
            threads=settings.threads,
            context=settings.context,
            gpu_layers=settings.gpu_layers,
            sequences=settings.draft_sequences,
            memory_bytes=budget,
        )
    )
