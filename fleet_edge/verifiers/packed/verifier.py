"""Packed verifier: all new tokens of all sequences in one row of one forward pass, without padding.

The model's own code computes everything but attention. Ours keeps sequences apart: it stores each row's key and value
in its sequence's slot and lets it see that slot up to its own position. Rollback is a shorter length; what lies beyond
is overwritten later.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_edge.verifiers.contract import CapacityExceeded, Item, TableVerifier, TargetInfo, VerifierError
from fleet_edge.verifiers.packed.attention import PackedStep, inspect_model, run_trial, running
from fleet_edge.verifiers.packed.kv import KVStore, SlabMemory, servable_context, tokens_to_serve
from fleet_edge.verifiers.packed.layout import Indices, SequenceSpan, lay_out
from fleet_edge.verifiers.packed.target import Target
from fleet_edge.verifiers.tokens import grammar_tokenizer

_log = logging.getLogger(__name__)

FEWEST_TOKENS: Final = 256
"""Shortest sequence that a budget must hold."""


class PackedVerifier(TableVerifier):
    """`Verifier` over a transformers model."""

    def __init__(self, target: Target, *, budget_bytes: int) -> None:
        """Prepare a model to be served, and check that it can be; nothing else may use it from now on.

        The budget for keys and values also bounds the length of a sequence: where it does not hold the model's whole
        context, `info.context` is smaller, and a warning says so. Raises `UnsupportedModel` if the architecture cannot
        be served or does not give the model's own logits, `VerifierError` if the budget is too small.
        """
        self._model: Any = target.model
        self._source = target.source
        self._device: torch.device = target.model.device
        memory = SlabMemory(
            inspect_model(self._model),
            budget_bytes=budget_bytes,
            dtype=target.model.dtype,
            device=self._device,
        )
        super().__init__(replace(target.info, context=_context(target.info, memory)))
        self._store = KVStore(memory, context=self._info.context)
        run_trial(self, self._model)

    @property
    def allocated_bytes(self) -> int:
        """Memory taken for keys and values, empty slots included; never more than the budget."""
        return self._store.allocated_bytes

    def grammar_tokenizer(self) -> GrammarTokenizer:
        vocabulary = self._info.vocabulary.size
        return grammar_tokenizer(self._source, vocabulary=vocabulary, end_tokens=self._info.end_tokens)

    def fork(self, sequence: int, source: int, length: int) -> None:
        self._table.check_fork(sequence, source, length)
        if length:
            if missing := self._store.missing_bytes({sequence: length}):
                raise CapacityExceeded(
                    f"The copy is {missing} bytes short of memory for keys and values; evict a sequence and try again."
                )
            try:
                self._store.fork(sequence, source, length)
            except MemoryError as error:
                raise _no_memory() from error
        self._table.fork(sequence, source, length)

    def close(self, sequence: int) -> None:
        if self._table.close(sequence):
            self._store.release(sequence)

    def fits(self, items: Sequence[Item]) -> bool:
        return not self._store.missing_bytes(self._lengths(items))

    def capacity(self) -> int:
        return self._store.room(self._table.lengths)

    def score(self, items: Sequence[Item]) -> torch.Tensor:
        self._table.check(items)
        missing = self._store.missing_bytes(self._lengths(items))
        if missing:
            raise CapacityExceeded(
                f"The step is {missing} bytes short of memory for keys and values; evict a sequence and try again."
            )
        if not items:
            return torch.empty((0, self._info.vocabulary.size), dtype=torch.float32, device=self._device)
        logits = self._forward(items)
        self._table.commit(items)
        return logits

    def _forward(self, items: Sequence[Item]) -> torch.Tensor:
        try:
            self._store.reserve(self._lengths(items), keep=self._table.lengths)
        except MemoryError as error:
            raise _no_memory() from error
        # Slots move while others are reserved, so they are looked up when all are.
        parts = [
            SequenceSpan(self._store.slot(item.sequence), self._table.computed(item.sequence), len(item.tokens))
            for item in items
        ]
        indices = Indices(self._device)
        layout = lay_out(parts, indices)
        tokens: list[int] = []
        positions: list[int] = []
        for index in layout.order:
            tokens.extend(items[index].tokens)
            positions.extend(range(parts[index].start, parts[index].start + parts[index].count))
        wanted: list[int] = []
        for item, start, part in zip(items, layout.starts, parts, strict=True):
            end = start + part.count
            wanted.extend(range(end - item.rows, end))
        ids, places, rows = indices.add(tokens), indices.add(positions), indices.add(wanted)
        with torch.inference_mode():
            indices.send()
            with running(PackedStep(layout)):
                output = self._model(
                    input_ids=ids.tensor.unsqueeze(0),
                    position_ids=places.tensor.unsqueeze(0),
                    use_cache=False,
                    logits_to_keep=rows.tensor,
                )
            logits: torch.Tensor = output.logits[0].float()
        return logits[:, : self._info.vocabulary.size]

    def _lengths(self, items: Sequence[Item]) -> dict[int, int]:
        """Return, by sequence, the number of computed tokens after a step."""
        return {item.sequence: self._table.computed(item.sequence) + len(item.tokens) for item in items}


def _no_memory() -> CapacityExceeded:
    return CapacityExceeded(
        "The machine has no memory left for keys and values; evict a sequence and give the verifier a smaller budget."
    )


def _context(info: TargetInfo, memory: SlabMemory) -> int:
    """Return the longest sequence that a budget serves; raises `VerifierError` if it is too short to be of use."""
    context = servable_context(info.context, budget_tokens=memory.budget_bytes // memory.bytes_per_token)
    if context == info.context:
        return context
    whole = memory.bytes_per_token * tokens_to_serve(info.context)
    if context < FEWEST_TOKENS:
        least = memory.bytes_per_token * tokens_to_serve(min(FEWEST_TOKENS, info.context))
        raise VerifierError(
            f"The budget of {memory.budget_bytes} bytes for keys and values holds no sequence of "
            f"{info.name}; set kv_bytes "
            f"to at least {least}, or to {whole} for sequences of the model's whole context of {info.context} tokens."
        )
    _log.warning(
        "The budget of %d bytes for keys and values holds sequences of %d tokens; "
        "for the whole context of %s, %d tokens, set kv_bytes to at least %d.",
        memory.budget_bytes,
        context,
        info.name,
        info.context,
        whole,
    )
    return context
