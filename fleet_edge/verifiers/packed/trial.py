"""Trial run: a model is served only if its packed logits are its own.

Reading a configuration finds the architectures that somebody thought of. This finds the others: a small run with
chunks, a rollback and two sequences side by side goes wrong if anything in the model but attention connects tokens.
"""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch

from fleet_edge.verifiers.contract import Item, Verifier
from fleet_edge.verifiers.packed.architecture import refusal
from fleet_edge.verifiers.packed.attention import IMPLEMENTATION

__all__ = ["run_trial"]

LENGTH: Final = 24  # more than `layout.FEW_ROWS` with a chunk before it, so that both kinds of group occur
SEED: Final = 20_250_716

# How far the logits may be from the model's own: root mean square of the difference over the standard deviation of
# the logits. Rounding makes 1e-6 in float32 and some 1e-2 in bfloat16; a forgotten state, mask or position 0.1 to 1.
_TOLERANCES: Final = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class _TensorVerifier(Verifier, Protocol):
    """A verifier whose logits are tensors of their own, which stay valid."""

    def score(self, items: Sequence[Item]) -> torch.Tensor:
        """See `Verifier.score`."""


def run_trial(verifier: _TensorVerifier, model: Any) -> None:  # noqa: ANN401 - transformers has no type information
    """Hold a verifier's logits against those of its model's own attention; leaves no sequence behind.

    Raises:
        UnsupportedModel: They differ, or the run fails.
    """
    length = min(LENGTH, verifier.info.context)
    generator = torch.Generator().manual_seed(SEED)
    texts = [
        torch.randint(verifier.info.vocabulary.size, (size,), generator=generator).tolist()
        for size in (length, length // 2)
    ]
    try:
        packed = _packed(verifier, texts)
        own = _own(model, texts)
    except Exception as error:  # what a foreign forward pass raises is anyone's guess
        raise refusal(model, "A trial run failed.") from error
    size = verifier.info.vocabulary.size
    for mine, theirs in zip(packed, own, strict=True):
        reference = theirs[:, :size].float()
        distance = float((mine - reference).square().mean().sqrt() / reference.std().clamp_min(1e-9))
        if not distance <= _TOLERANCES[model.dtype]:  # also if it is not a number
            raise refusal(model, f"In a trial run its logits were off by {distance:.1e} of their spread.")


def _packed(verifier: _TensorVerifier, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return every row of both texts, the first in two chunks with a rollback between."""
    first, second = texts
    cut = len(first) // 4
    mine, other = -1, -2  # no session has these
    try:
        verifier.open(mine)
        verifier.open(other)
        head = verifier.score([Item(mine, first[:cut], cut)])
        verifier.score([Item(mine, second[:cut], 0)])
        verifier.truncate(mine, cut)
        rest = len(first) - cut
        tail = verifier.score([Item(other, second, len(second)), Item(mine, first[cut:], rest)])
    finally:
        verifier.close(mine)
        verifier.close(other)
    return [torch.cat([head, tail[len(second) :]]), tail[: len(second)]]


def _own(model: Any, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:  # noqa: ANN401
    """Return every row of each text by the model's own attention, one text at a time."""
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return [
                model(input_ids=torch.tensor([text], device=model.device), use_cache=False).logits[0] for text in texts
            ]
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
