"""llama.cpp verifier: the contract for a GGUF, on llama.cpp's low-level interface.

One context has a fixed number of sequences, and computes a step in as few calls as it can (see `layout`). A rejected
draft is cut off. The running state of a hybrid has no tokens to cut: there a sequence has two of llama.cpp's, the live
one, and a copy from before its latest step. A rejection goes back to the copy, and the accepted tokens are computed
again with the next step, in the same call.
"""

import heapq
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_common.extras import install_command
from fleet_common.gguf_files import GgufUnreadable, read_header
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.llama_trial import require_trial
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import (
    CapacityExceeded,
    Item,
    OnProgress,
    TargetInfo,
    TokenVerifier,
    UnsupportedModel,
    Verifier,
    VerifierError,
    no_progress,
)
from fleet_edge.verifiers.llama_cpp.context import CallLimits, NativeContext, StreamSpan, fill, pad
from fleet_edge.verifiers.llama_cpp.target import (
    CELL_ROUNDING,
    GgufTarget,
    Sizes,
    open_target,
    size_states,
    size_streams,
)
from fleet_edge.verifiers.source import check_source, is_gguf, weights_digest, window_limit

_LENGTH: Final = 24
_SEED: Final = 20_261_125

_TOLERANCE: Final = 0.1
"""Limit of the error in a trial, as RMS difference over the standard deviation of the logits. Kernels for few and for
many tokens differ by about 1e-2; a wrong rollback gives 0.1 to 1."""


def run_trial(verifier: Verifier) -> None:
    """Check that rows do not depend on how a sequence was split, rolled back, copied and batched.

    Raises `UnsupportedModel` if they do, or the model cannot be rolled back.
    """
    length = min(_LENGTH, verifier.info.context - 1)
    text = random.Random(_SEED).choices(range(verifier.info.vocabulary.size), k=length)  # noqa: S311 - no secret
    cut = length // 3
    first, second = -1, -2  # no session has these
    try:
        verifier.open(first)
        whole = _rows(verifier, [Item(first, text, length - cut)])
        verifier.close(first)
        verifier.open(first)
        verifier.score([Item(first, text[:cut], 0)])
        verifier.score([Item(first, text[1 : cut + 1], 1)])
        verifier.truncate(first, cut)
        cut_rows = _rows(verifier, [Item(first, text[cut:], length - cut)])
        pairs = [(whole, cut_rows)]
        if verifier.fits([Item(second, [0], 0)]):
            verifier.fork(second, first, cut + 1)
            pairs.append((whole[1:], _rows(verifier, [Item(second, text[cut + 1 :], length - cut - 1)])))
    finally:
        for sequence in (first, second):
            verifier.close(sequence)
    for one, other in pairs:
        distance = float(np.sqrt(np.square(one - other).mean()) / max(one.std(), 1e-9))
        if not distance <= _TOLERANCE:  # also if it is not a number
            raise UnsupportedModel(
                f"{verifier.info.name} cannot be served: in a trial run its logits after a rollback were off by "
                f"{distance:.1e} of their spread; choose another target model."
            )


def _rows(verifier: Verifier, items: Sequence[Item]) -> NDArray[np.float32]:
    found: Any = verifier.score(items)
    return np.array(found, dtype=np.float32)


_ALIKE: Final = 2
"""Fewest new tokens of a stream that llama.cpp computes batch-invariantly."""

_PASS_TOKENS: Final = 8
_GPU_PASS_TOKENS: Final = 64
"""Cost of a pass over the weights in tokens: 2 to 12 on CPUs. Half or twice as much changes few calls."""

_REPLAYED: Final = 8
"""Tokens that are computed again with each step, before the copy is taken behind them, which costs a pass."""


@dataclass(slots=True)
class _Slot:
    """A sequence of llama.cpp, for a hybrid two: the tokens that the live one and its copy have."""

    number: int
    copy: int
    live: int = 0
    copied: int = 0


class LlamaCppVerifier(TokenVerifier):
    def __init__(
        self, target: GgufTarget, *, budget_bytes: int, context: int = 0, threads: int = 0, batch_invariant: bool = True
    ) -> None:
        """Prepare a model, and check that it can be served.

        The budget is divided into sequences of `info.context` tokens, which those of a hybrid share. `context` 0 means
        the model's own, or fewer tokens if the budget would otherwise hold few sequences. `threads` 0 means all
        processors. `batch_invariant` gives single tokens company where an item asks for it; hybrids do without. Raises
        `UnsupportedModel` if the model cannot be rolled back, `VerifierError` if the budget is too small.
        """
        self._target, self._hybrid = target, target.is_hybrid
        threads = threads or len(os.sched_getaffinity(0))
        sizes = _sizes(target, budget_bytes, context)
        batch_invariant = batch_invariant and not self._hybrid
        info = TargetInfo(
            name=target.name,
            vocabulary=target.vocabulary,
            context=sizes.context,
            end_tokens=target.end_tokens,
            runs_on=f"llama.cpp, {target.quantization}, {threads} threads, {sizes.sequences} sequences at a time",
            min_step_tokens=_ALIKE if batch_invariant else 1,
            batch_invariant=batch_invariant and not target.on_gpu,
        ).identified(b"llama.cpp", weights_digest(target.path))
        super().__init__(info, sizes.total)
        self._limits = CallLimits(sizes.batch, sizes.rows)
        self._stream_cells = sizes.cells // sizes.sequences
        natives = 2 if self._hybrid else 1
        numbers = range(0, natives * sizes.sequences, natives)
        self._slots = {number: _Slot(number, number + 1) for number in numbers}
        self._free = list(numbers)  # a heap: low streams are neighbours
        self._used: dict[int, _Slot] = {}  # by sequence
        self._context = target.thread.call(
            NativeContext, target, sizes, sequences=natives * sizes.sequences, threads=threads
        )
        self._logits = np.empty((0, target.rows), np.float32)
        run_trial(self)

    def grammar_tokenizer(self) -> GrammarTokenizer:
        return self._target.grammar_tokenizer()

    def fork(self, sequence: int, source: int, length: int) -> None:
        super().fork(sequence, source, length)
        origin = self._used.get(source)
        if origin is None or not length:
            return
        known = [(origin.live, origin.number), (origin.copied, origin.copy)]
        # Without a state of that length, the tokens are computed again when they are needed.
        tokens, native = next((each for each in known if not self._hybrid or 0 < each[0] <= length), (0, 0))
        if not tokens:
            return
        if not self._free:
            self.close(sequence)
            raise CapacityExceeded("There is no sequence left for a copy; evict one and try again.")
        slot = self._claim_slot(sequence)
        self._context.copy(native, slot.number)
        slot.live = tokens
        self._cut(slot, length)

    def truncate(self, sequence: int, length: int) -> None:
        super().truncate(sequence, length)
        slot = self._used.get(sequence)
        if slot is not None:
            self._cut(slot, length)

    def close(self, sequence: int) -> None:
        super().close(sequence)
        self._release(sequence)

    def fits(self, items: Sequence[Item]) -> bool:
        return self._missing(items) <= 0 and super().fits(items)

    def capacity(self) -> int:
        tokens, free = super().capacity(), len(self._free)
        # Sequences without a slot may need one each.
        return min(tokens, free) if len(self._tokens) - len(self._used) > free else tokens

    def score(self, items: Sequence[Item]) -> NDArray[np.float32]:
        self._check(items)
        if (missing := self._missing(items)) > 0:
            raise CapacityExceeded(f"The step is {missing} sequences short; evict a sequence and try again.")
        slots = [self._used.get(item.sequence) or self._claim_slot(item.sequence) for item in items]
        try:
            logits = self._target.thread.call(self._compute, items, slots)
        except BaseException:
            self._take_back(items, slots)
            raise
        self._commit(items)
        return logits[:, : self._info.vocabulary.size]

    def _missing(self, items: Sequence[Item]) -> int:
        return sum(item.sequence not in self._used for item in items) - len(self._free)

    def _claim_slot(self, sequence: int) -> _Slot:
        slot = self._used[sequence] = self._slots[heapq.heappop(self._free)]
        return slot

    def _compute(self, items: Sequence[Item], slots: Sequence[_Slot]) -> NDArray[np.float32]:
        stable = any(item.stable for item in items)
        behind = [self._tokens[item.sequence][slot.live :] for item, slot in zip(items, slots, strict=True)]
        if any(len(tokens) > _REPLAYED for tokens in behind):
            self._decode([(slot, tokens, 0) for slot, tokens in zip(slots, behind, strict=True) if tokens], stable)
            behind = [[] for _ in items]
        for slot, tokens in zip(slots, behind, strict=True) if self._hybrid else ():
            if not tokens and slot.live:
                self._forget_copy(slot)
                self._context.copy(slot.number, slot.copy)
                slot.copied = slot.live
        parts = [
            (slot, [*again, *item.tokens], item.rows) for slot, again, item in zip(slots, behind, items, strict=True)
        ]
        return self._decode(parts, stable)

    def _decode(self, new: Sequence[tuple[_Slot, Sequence[int], int]], stable: bool) -> NDArray[np.float32]:
        """Compute tokens of sequences; return the last rows of each, in order."""
        parts, total = list[StreamSpan](), 0
        for slot, tokens, rows in new:
            parts.append(StreamSpan(slot.number, tokens, rows, total))
            total += rows
        if len(self._logits) < total:  # reused: allocation costs as much as copying
            self._logits = np.empty((total, self._target.rows), np.float32)
        for call in self._calls(parts, stable):
            found = self._context.compute(call, {part.stream: self._slots[part.stream].live for part in call})
            at = 0
            for part in call:
                slot = self._slots[part.stream]
                slot.live += len(part.tokens)
                if part.padding:
                    self._context.cut(part.stream, slot.live)
                self._logits[part.row : part.row + part.rows] = found[at : at + part.rows]
                at += part.rows
        return self._logits[:total]

    def _calls(self, parts: Sequence[StreamSpan], stable: bool) -> list[list[StreamSpan]]:
        if self._hybrid:
            return fill(parts, self._limits)
        # On a CPU llama.cpp uses other kernels for a stream's single token than for several, which round alike in any
        # number: with `_ALIKE` rows are bit-identical for the same text.
        return pad(
            parts,
            room=[self._stream_cells - slot.live for slot in self._slots.values()],
            pass_tokens=_GPU_PASS_TOKENS if self._target.on_gpu else _PASS_TOKENS,
            limits=self._limits,
            min_tokens=self._info.min_step_tokens if stable else 1,
        )

    def _take_back(self, items: Sequence[Item], slots: Sequence[_Slot]) -> None:
        """Restore the sequences of a failed step."""
        for item, slot in zip(items, slots, strict=True):
            slot.live = self._table.computed(item.sequence)
            if self._hybrid or not slot.live:
                self._release(item.sequence)
            else:
                self._context.cut(slot.number, slot.live)

    def _cut(self, slot: _Slot, length: int) -> None:
        if slot.live <= length:
            return
        if not self._hybrid:
            self._context.cut(slot.number, length)
            slot.live = length
            return
        self._context.cut(slot.number, 0)
        slot.live = 0
        if slot.copied > length:
            self._forget_copy(slot)
        elif slot.copied:
            self._context.copy(slot.copy, slot.number)
            slot.live = slot.copied

    def _release(self, sequence: int) -> None:
        slot = self._used.pop(sequence, None)
        if slot is None:
            return
        self._context.cut(slot.number, 0)
        slot.live = 0
        if self._hybrid:
            self._forget_copy(slot)
        heapq.heappush(self._free, slot.number)

    def _forget_copy(self, slot: _Slot) -> None:
        self._context.cut(slot.copy, 0)
        slot.copied = 0


def _sizes(target: GgufTarget, budget_bytes: int, context: int) -> Sizes:
    heads = 0 if target.on_gpu else target.heads
    model = {"token_bytes": target.token_kv_bytes, "width": target.rows, "heads": heads}
    sizes = {"budget_bytes": budget_bytes, "wanted": context, "trained": target.context or budget_bytes} | model
    states = target.state_bytes
    found = size_states(state_bytes=states, **sizes) if target.is_hybrid else size_streams(**sizes)
    if found is None:
        least = 2 * states + CELL_ROUNDING * target.token_kv_bytes
        raise VerifierError(
            f"The budget of {budget_bytes} bytes for keys and values holds no sequence of {target.name}; set kv_bytes "
            f"to at least {least}."
        )
    return found


def check(settings: EdgeSettings) -> None:
    """Check that the target is a GGUF, and that llama.cpp is installed; raises `VerifierError`."""
    if find_spec("llama_cpp") is None:
        raise VerifierError(
            "The engine llama.cpp needs the extra `edge-llama`; set engine to another one, or install it: "
            f"{install_command('edge-llama')}"
        )
    check_source(settings.target)
    if not is_gguf(Path(settings.target).expanduser()):
        raise UnsupportedModel(
            f"The engine llama.cpp takes a GGUF, and {settings.target} is none; name a .gguf file as target, or set "
            "engine to auto."
        )
    try:
        header = read_header(Path(settings.target).expanduser())
    except GgufUnreadable as error:
        raise UnsupportedModel(str(error)) from error
    if header.architecture == "gpt-oss" and header.of("rope.scaling.type") == "yarn":
        raise UnsupportedModel(
            f"The engine llama.cpp computes {settings.target} in another way than its makers, since it rounds the "
            "borders of YaRN in gpt-oss; set engine to blocks."
        )


def load(settings: EdgeSettings, on_progress: OnProgress = no_progress) -> Verifier:
    check(settings)
    require_trial(Path(settings.target).expanduser(), error=VerifierError)
    target = open_target(Path(settings.target), gpu_layers=settings.gpu_layers, on_progress=on_progress)
    limits = (settings.context, window_limit(Path(settings.target).expanduser()))
    context = min((each for each in limits if each), default=0)
    return LlamaCppVerifier(
        target,
        budget_bytes=settings.kv_bytes,
        context=context,
        threads=settings.threads,
        batch_invariant=settings.batch_invariant,
    )
