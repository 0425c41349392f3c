"""llama.cpp verifier for hybrids: models of which some layers have a running state instead of keys and values.

llama.cpp cannot take back a token of a running state. So a sequence has two of llama.cpp's: the live one, and a copy
from before its latest step, which shares its keys and values. A rejection goes back to the copy, and the accepted
tokens are computed again with the next step, in the same batch.
"""

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.llama import library, native_reason
from fleet_edge.verifiers.contract import CapacityExceeded, Item, TargetInfo, TokenVerifier, VerifierError
from fleet_edge.verifiers.llama_cpp.slab import CELL_ROUNDING, GgufTarget
from fleet_edge.verifiers.source import weights_digest

_MAX_SLOTS: Final = 64
_STATES_SHARE: Final = 2
"""At most this fraction of the budget is for running states, the rest for keys and values."""

_REPLAYED: Final = 8
"""Tokens that are computed again with each step, before the copy is taken behind them, which costs a pass."""

_ROW_BYTES: Final = 64 << 20
_SCORE_BYTES: Final = 512 << 20
"""Memory for attention scores, outside the budget; all sequences share their cells, so it bounds these."""

_CALL_TOKENS: Final = 128
_FLOAT32: Final = 4
_NO_SLOT: Final = 1


@dataclass(slots=True)
class _Slot:
    """Two sequences of llama.cpp: the tokens that the live one and its copy have."""

    number: int
    live: int = 0
    copied: int = 0

    @property
    def sequence(self) -> int:
        return 2 * self.number

    @property
    def copy(self) -> int:
        return 2 * self.number + 1


class HybridVerifier(TokenVerifier):
    def __init__(self, target: GgufTarget, *, budget_bytes: int, context: int = 0, threads: int = 0) -> None:
        """Prepare a model. `context` and `threads` are as `LlamaCppVerifier` has them.

        Raises `VerifierError` if the budget is too small or memory is short.
        """
        threads = threads or len(os.sched_getaffinity(0))
        state = 2 * target.state_bytes
        slots = max(1, min(_MAX_SLOTS, budget_bytes // _STATES_SHARE // max(1, state)))
        tokens = min(
            max(0, budget_bytes - slots * state) // target.token_kv_bytes,
            slots * (target.context or budget_bytes),
            budget_bytes if target.on_gpu else _SCORE_BYTES // (_CALL_TOKENS * target.heads * _FLOAT32),
        )
        tokens = tokens // CELL_ROUNDING * CELL_ROUNDING
        if not tokens:
            least = slots * state + CELL_ROUNDING * target.token_kv_bytes
            raise VerifierError(
                f"The budget of {budget_bytes} bytes for keys, values and running states holds no sequence of "
                f"{target.name}; set kv_bytes to at least {least}."
            )
        length = min(each for each in (target.context, context, tokens - 1) if each)
        super().__init__(
            TargetInfo(
                name=target.name,
                vocabulary=target.vocabulary,
                context=length,
                end_tokens=target.end_tokens,
                runs_on=f"llama.cpp, {target.quantization}, {threads} threads, {slots} sequences at a time",
            ).identified(b"llama.cpp", weights_digest(target.path)),
            tokens - 1,
        )
        self._target, self._library = target, library()
        self._free = [_Slot(number) for number in range(slots)]
        self._slots: dict[int, _Slot] = {}
        self._rows = max(1, min(_CALL_TOKENS, _ROW_BYTES // (_FLOAT32 * target.rows)))
        self._native = target.thread.call(self._open, tokens, 2 * slots, threads)
        self._memory = self._library.llama_get_memory(self._native)
        self._batch = self._library.llama_batch_init(_CALL_TOKENS, 0, 1)
        weakref.finalize(self, _free, self._library, self._native, self._batch, target)
        for index in range(_CALL_TOKENS):
            self._batch.n_seq_id[index] = 1

    def _open(self, cells: int, sequences: int, threads: int) -> Any:  # noqa: ANN401 - a native pointer
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max, parameters.kv_unified = cells, sequences, True
        parameters.n_batch = parameters.n_ubatch = _CALL_TOKENS
        parameters.n_outputs_max = self._rows
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = (
            self._library.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if self._target.on_gpu
            else self._library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        parameters.swa_full = True
        parameters.no_perf = True
        native_reason()
        native = self._library.llama_init_from_model(self._target.handle, parameters)
        if not native:
            raise VerifierError(
                f"llama.cpp has no memory for {cells} tokens of {self._target.name} ({native_reason()}); set a smaller "
                "kv_bytes."
            )
        return native

    def grammar_tokenizer(self) -> GrammarTokenizer:
        return self._target.grammar_tokenizer()

    def fork(self, sequence: int, source: int, length: int) -> None:
        super().fork(sequence, source, length)
        origin = self._slots.get(source)
        if origin is None or not self._free:
            return  # it is computed again when it is needed
        for tokens, native in ((origin.live, origin.sequence), (origin.copied, origin.copy)):
            if 0 < tokens <= length:
                slot = self._slots[sequence] = self._free.pop()
                self._library.llama_memory_seq_cp(self._memory, native, slot.sequence, -1, -1)
                slot.live = tokens
                return

    def truncate(self, sequence: int, length: int) -> None:
        super().truncate(sequence, length)
        slot = self._slots.get(sequence)
        if slot is not None and slot.live > length:
            self._remove(slot.sequence)
            slot.live = 0
            if slot.copied > length:
                self._forget_copy(slot)
            elif slot.copied:
                self._library.llama_memory_seq_cp(self._memory, slot.copy, slot.sequence, -1, -1)
                slot.live = slot.copied

    def close(self, sequence: int) -> None:
        super().close(sequence)
        slot = self._slots.pop(sequence, None)
        if slot is not None:
            self._clear(slot)
            self._free.append(slot)

    def fits(self, items: Sequence[Item]) -> bool:
        return self._missing(items) <= 0 and super().fits(items)

    def capacity(self) -> int:
        tokens, free = super().capacity(), len(self._free)
        return min(tokens, free) if len(self._tokens) - len(self._slots) > free else tokens

    def score(self, items: Sequence[Item]) -> NDArray[np.float32]:
        self._check(items)
        if (missing := self._missing(items)) > 0:
            raise CapacityExceeded(f"The step is {missing} sequences short; evict a sequence and try again.")
        for item in items:
            if item.sequence not in self._slots:
                self._slots[item.sequence] = self._free.pop()
        try:
            logits = self._target.thread.call(self._compute, items)
        except BaseException:
            for item in items:
                self._clear(self._slots[item.sequence])
            raise
        self._commit(items)
        return logits[:, : self._info.vocabulary.size]

    def _missing(self, items: Sequence[Item]) -> int:
        return sum(item.sequence not in self._slots for item in items) - len(self._free)

    def _compute(self, items: Sequence[Item]) -> NDArray[np.float32]:
        slots = [self._slots[item.sequence] for item in items]
        behind = [self._tokens[item.sequence][slot.live :] for item, slot in zip(items, slots, strict=True)]
        long = [(slot, tokens) for slot, tokens in zip(slots, behind, strict=True) if len(tokens) > _REPLAYED]
        if long:
            self._decode([(slot, tokens, 0) for slot, tokens in long])
            behind = [tokens if len(tokens) <= _REPLAYED else [] for tokens in behind]
        for slot, tokens in zip(slots, behind, strict=True):
            if not tokens and slot.live:
                self._forget_copy(slot)
                self._library.llama_memory_seq_cp(self._memory, slot.sequence, slot.copy, -1, -1)
                slot.copied = slot.live
        return self._decode(
            [
                (slot, [*tokens, *item.tokens], item.rows)
                for slot, tokens, item in zip(slots, behind, items, strict=True)
            ]
        )

    def _decode(self, parts: Sequence[tuple[_Slot, Sequence[int], int]]) -> NDArray[np.float32]:
        """Compute tokens of sequences, in as many calls as it takes; return the last rows of each, in order."""
        wanted = sum(rows for _, _, rows in parts)
        logits = np.empty((wanted, self._target.rows), dtype=np.float32)
        waiting = [
            (slot, token, place >= len(tokens) - rows)
            for slot, tokens, rows in parts
            for place, token in enumerate(tokens)
        ]
        at = begin = 0
        while begin < len(waiting):
            end, outputs = begin, 0
            while end < len(waiting) and end - begin < _CALL_TOKENS and outputs + waiting[end][2] <= self._rows:
                outputs += waiting[end][2]
                end += 1
            self._call(waiting[begin:end])
            if outputs:
                found = self._library.llama_get_logits(self._native)
                if not found:
                    raise VerifierError("llama.cpp gave no logits.")
                logits[at : at + outputs] = np.ctypeslib.as_array(found, (outputs, self._target.rows))
            at, begin = at + outputs, end
        return logits

    def _call(self, tokens: Sequence[tuple[_Slot, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, (slot, token, output) in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.logits[index] = token, slot.live, output
            batch.seq_id[index][0] = slot.sequence
            slot.live += 1
        native_reason()
        status = self._library.llama_decode(self._native, batch)
        if status != 0:
            kind = CapacityExceeded if status == _NO_SLOT else VerifierError
            raise kind(f"llama.cpp could not compute a step (status {status}): {native_reason()}.")

    def _clear(self, slot: _Slot) -> None:
        self._remove(slot.sequence)
        self._forget_copy(slot)
        slot.live = 0

    def _forget_copy(self, slot: _Slot) -> None:
        self._remove(slot.copy)
        slot.copied = 0

    def _remove(self, native: int) -> None:
        self._library.llama_memory_seq_rm(self._memory, native, -1, -1)


def _free(native_library: Any, native: Any, batch: Any, _target: GgufTarget) -> None:  # noqa: ANN401 - untyped
    native_library.llama_batch_free(batch)
    native_library.llama_free(native)
