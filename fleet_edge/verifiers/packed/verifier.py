"""Packed verifier: all new tokens of all sequences in one row of one forward pass, without padding.

The model's own code computes everything but attention. Ours keeps sequences apart: it stores each row's key and value
in its sequence's pages and lets it see these up to its own position. Rollback is a shorter length; what lies beyond is
overwritten later.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from fleet_common.grammar.process import GrammarTokenizer
from fleet_edge.verifiers.contract import Item
from fleet_edge.verifiers.packed.attention import PackedStep, inspect_model, run_trial, running
from fleet_edge.verifiers.packed.kv import TorchPages
from fleet_edge.verifiers.packed.layout import Part, lay_out, send
from fleet_edge.verifiers.packed.target import Target
from fleet_edge.verifiers.paged import PagedVerifier
from fleet_edge.verifiers.tokens import grammar_tokenizer


class PackedVerifier(PagedVerifier):
    """`Verifier` over a transformers model."""

    def __init__(self, target: Target, *, budget_bytes: int) -> None:
        """Prepare a model to be served, and check that it can be; nothing else may use it from now on.

        Raises `UnsupportedModel` if the architecture cannot be served or does not give the model's own logits,
        `VerifierError` if the budget for keys and values is too small.
        """
        self._model: Any = target.model
        self._source = target.source
        self._device: torch.device = target.model.device
        self._pages = TorchPages(
            inspect_model(self._model), budget_bytes=budget_bytes, dtype=target.model.dtype, device=self._device
        )
        super().__init__(target.info, self._pages)
        run_trial(self, self._model)

    def grammar_tokenizer(self) -> GrammarTokenizer:
        vocabulary = self._info.vocabulary.size
        return grammar_tokenizer(self._source, vocabulary=vocabulary, end_tokens=self._info.end_tokens)

    def compute(self, items: Sequence[Item]) -> torch.Tensor:
        if not items:
            return torch.empty((0, self._info.vocabulary.size), dtype=torch.float32, device=self._device)
        parts = [
            Part(self._pages.table(item.sequence), self._table.computed(item.sequence), len(item.tokens))
            for item in items
        ]
        ends = accumulate(part.count for part in parts)
        wanted = [np.arange(end - item.rows, end) for item, end in zip(items, ends, strict=True)]
        with torch.inference_mode():
            layout = lay_out(parts, self._device)
            tokens = np.concatenate([np.array(item.tokens, np.int64) for item in items])
            ids, rows = send([tokens, np.concatenate(wanted)], self._device)
            with running(PackedStep(layout, self._pages)):
                output = self._model(
                    input_ids=ids.unsqueeze(0),
                    position_ids=layout.positions.unsqueeze(0),
                    use_cache=False,
                    logits_to_keep=rows,
                )
            logits: torch.Tensor = output.logits[0].float()
        return logits
