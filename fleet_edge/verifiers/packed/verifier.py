"""The packed verifier: all new tokens of all sequences in one row of one forward pass, without padding.

The model's own code computes everything but attention. Rows of different sequences meet in attention only, and
there ours keeps them apart: it stores each row's key and value in its sequence's slot and lets it see that slot
up to its own position. Rollback is a shorter length; what lies beyond is overwritten by what comes next.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fleet_edge.verifiers.contract import CapacityExceeded, Item, TargetInfo, VerifierError
from fleet_edge.verifiers.packed.architecture import inspect_model
from fleet_edge.verifiers.packed.attention import running
from fleet_edge.verifiers.packed.kv import KVStore
from fleet_edge.verifiers.packed.layout import Part, lay_out
from fleet_edge.verifiers.packed.step import PackedStep
from fleet_edge.verifiers.packed.target import Target
from fleet_edge.verifiers.packed.trial import run_trial
from fleet_edge.verifiers.sequences import SequenceTable

__all__ = ["PackedVerifier"]

ROUNDING = 1.5
"""Slots round lengths up by at most this factor (above the smallest), so a budget in bytes buys fewer tokens."""


class PackedVerifier:
    """`Verifier` over a transformers model."""

    def __init__(self, target: Target, *, budget_tokens: int | None = None, budget_bytes: int | None = None) -> None:
        """Prepare a model to be served, and check that it can be.

        Args:
            target: The model; from now on it is this verifier's alone.
            budget_tokens: Most computed tokens in all sequences.
            budget_bytes: The same as memory for keys and values. Exactly one of the two is given.

        Raises:
            UnsupportedModel: The architecture cannot be served, or does not give the model's own logits.
            VerifierError: The budget holds nothing.
        """
        if (budget_tokens is None) == (budget_bytes is None):
            raise VerifierError("Give the key/value budget either in tokens or in bytes.")
        self._model: Any = target.model
        self._info = target.info
        self._device: torch.device = target.model.device
        self._store = KVStore(
            inspect_model(self._model),
            context=self._info.context,
            dtype=target.model.dtype,
            device=self._device,
        )
        if budget_tokens is None:
            budget_tokens = int((budget_bytes or 0) / (ROUNDING * self._store.bytes_per_token))
        self._ledger = SequenceTable(
            context=self._info.context, vocabulary=self._info.vocabulary.size, budget=budget_tokens
        )
        run_trial(self, self._model)

    @property
    def info(self) -> TargetInfo:
        """The target model's identity and limits."""
        return self._info

    @property
    def allocated_bytes(self) -> int:
        """Memory taken for keys and values, empty slots included."""
        return self._store.allocated_bytes

    def open(self, sequence: int) -> None:
        """Begin a sequence with nothing computed."""
        self._ledger.open(sequence)

    def computed(self, sequence: int) -> int:
        """Return the number of tokens whose keys and values are stored."""
        return self._ledger.computed(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all computed tokens from `length` on."""
        self._ledger.truncate(sequence, length)

    def close(self, sequence: int) -> None:
        """End a sequence and free its memory."""
        if self._ledger.close(sequence):
            self._store.release(sequence)

    def capacity(self) -> int:
        """Return the number of tokens that the budget has left."""
        return self._ledger.room

    def score(self, items: Sequence[Item]) -> torch.Tensor:
        """Compute all items in one forward pass; see `Verifier.score`."""
        self._ledger.admit(items)
        if not items:
            return torch.empty((0, self._info.vocabulary.size), dtype=torch.float32, device=self._device)
        logits = self._forward(items)
        self._ledger.commit(items)
        return logits

    def _forward(self, items: Sequence[Item]) -> torch.Tensor:
        parts = self._parts(items)
        layout = lay_out(parts, device=self._device)
        tokens: list[int] = []
        positions: list[int] = []
        for index in layout.order:
            tokens.extend(items[index].tokens)
            positions.extend(range(parts[index].start, parts[index].start + parts[index].count))
        wanted: list[int] = []
        for item, start, part in zip(items, layout.starts, parts, strict=True):
            end = start + part.count
            wanted.extend(range(end - item.rows, end))
        with torch.inference_mode(), running(PackedStep(layout)):
            output = self._model(
                input_ids=self._indices(tokens).unsqueeze(0),
                position_ids=self._indices(positions).unsqueeze(0),
                use_cache=False,
                logits_to_keep=self._indices(wanted),
            )
            logits: torch.Tensor = output.logits[0, :, : self._info.vocabulary.size].float()
        return logits

    def _parts(self, items: Sequence[Item]) -> list[Part]:
        starts = [self._ledger.computed(item.sequence) for item in items]
        for item, start in zip(items, starts, strict=True):
            try:
                self._store.reserve(item.sequence, start + len(item.tokens), keep=start)
            except MemoryError as error:
                raise CapacityExceeded(
                    "The machine has no memory left for keys and values; evict a sequence and give the "
                    "verifier a smaller budget."
                ) from error
        # Slots move while others are reserved, so they are looked up when all are.
        return [
            Part(self._store.slot(item.sequence), start, len(item.tokens))
            for item, start in zip(items, starts, strict=True)
        ]

    def _indices(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
