"""torch verifier: all new tokens of all sequences in one row of one forward pass, without padding.

The model's own code computes everything but attention. Ours keeps sequences apart: it stores each row's key and value
in a page of its sequence, and lets it see the sequence's pages up to its own position. Rollback is a shorter length;
what lies beyond is overwritten later.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch

from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_edge.verifiers.blocks.kv import PAGE
from fleet_edge.verifiers.contract import Item
from fleet_edge.verifiers.paged import PagedVerifier
from fleet_edge.verifiers.tokens import grammar_tokenizer
from fleet_edge.verifiers.torch_engine.attention import PagedStep, TensorPages, inspect_model, run_trial, running
from fleet_edge.verifiers.torch_engine.layout import Indices, SequenceSpan, lay_out
from fleet_edge.verifiers.torch_engine.target import Target

_GATHERED_BYTES: Final = {"cpu": 2 << 20, "cuda": 256 << 20}
"""Keys and values of a layer that are gathered at once, unless one sequence has more. On a CPU they stay in its cache:
there a copy through memory takes up to half as long again as attention itself."""


class TorchVerifier(PagedVerifier):
    """`Verifier` over a transformers model."""

    def __init__(self, target: Target, *, budget_bytes: int) -> None:
        """Prepare a model to be served, and check that it can be; nothing else may use it from now on.

        Raises `UnsupportedModel` if the architecture cannot be served or does not give the model's own logits,
        `VerifierError` if the budget is too small, or there is no memory for it.
        """
        self._model: Any = target.model
        self._source = target.source
        self._device: torch.device = target.model.device
        shapes = inspect_model(self._model)
        dtype = target.model.dtype
        self._memory = TensorPages(shapes, budget_bytes=budget_bytes, dtype=dtype, device=self._device)
        widest = max(shape.numbers for shape in shapes) * dtype.itemsize * PAGE
        self._max_pages = _GATHERED_BYTES.get(self._device.type, _GATHERED_BYTES["cuda"]) // widest
        super().__init__(target.info, self._memory)
        run_trial(self, self._model)

    def grammar_tokenizer(self) -> GrammarTokenizer:
        vocabulary = self._info.vocabulary.size
        return grammar_tokenizer(self._source, vocabulary=vocabulary, end_tokens=self._info.end_tokens)

    def score(self, items: Sequence[Item]) -> torch.Tensor:
        with torch.inference_mode():
            self._reserve(items)
        if not items:
            return torch.empty((0, self._info.vocabulary.size), dtype=torch.float32, device=self._device)
        logits = self._forward(items)
        self._table.commit(items)
        return logits

    def _forward(self, items: Sequence[Item]) -> torch.Tensor:
        parts = [
            SequenceSpan(self._pages.table(item.sequence), self._table.computed(item.sequence), len(item.tokens))
            for item in items
        ]
        indices = Indices(self._device)
        layout = lay_out(parts, indices, max_pages=self._max_pages)
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
            with running(PagedStep(layout, self._memory)):
                output = self._model(
                    input_ids=ids.tensor.unsqueeze(0),
                    position_ids=places.tensor.unsqueeze(0),
                    use_cache=False,
                    logits_to_keep=rows.tensor,
                )
            logits: torch.Tensor = output.logits[0].float()
        return logits[:, : self._info.vocabulary.size]
