"""Toy transformer: a one-layer Llama, computed here in float64 and loaded by llama.cpp as a GGUF.

Unlike a Markov language it depends on the whole prefix through keys and values: what an engine keeps, rolls back and
computes again shows in its output.
"""

import itertools
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sampling.distribution import Float
from schemas.policy import SamplingPolicy
from tests.support.markov import MAX_JOINT
from tests.support.reference import shaped

CONTEXT: Final = 512
"""Most tokens in one sequence of the GGUF."""

_WIDTH: Final = 64
_HEADS: Final = 2
_INNER: Final = 96
_EPSILON: Final = 1e-5
_ROPE_BASE: Final = 10_000.0
_HEAD: Final = _WIDTH // _HEADS  # keys and values have one head, which all queries share
_SHAPES: Final = {
    "blk.0.attn_q": (_WIDTH, _WIDTH),
    "blk.0.attn_k": (_HEAD, _WIDTH),
    "blk.0.attn_v": (_HEAD, _WIDTH),
    "blk.0.attn_output": (_WIDTH, _WIDTH),
    "blk.0.ffn_gate": (_INNER, _WIDTH),
    "blk.0.ffn_up": (_INNER, _WIDTH),
    "blk.0.ffn_down": (_WIDTH, _INNER),
}
_NORMS: Final = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")


class ToyTransformer:
    """A language. Immutable; equal arguments make equal languages on one version of numpy."""

    def __init__(self, *, size: int, seed: int, sharpness: float = 1.2) -> None:
        random = np.random.default_rng(seed)

        def weight(rows: int, columns: int, scale: float) -> NDArray[np.float32]:
            return (random.standard_normal((rows, columns)) * scale).astype(np.float32)

        # Attention is far from uniform and as strong as the token itself, so that a wrong key or value shows.
        self._weights = {"token_embd": weight(size, _WIDTH, 1.0)}
        self._weights |= {name: weight(*shape, 2.0 / _WIDTH**0.5) for name, shape in _SHAPES.items()}
        self._weights["output"] = weight(size, _WIDTH, sharpness / _WIDTH**0.5)
        self._rows: dict[tuple[int, ...], NDArray[np.float32]] = {}

    @property
    def size(self) -> int:
        return len(self._weights["token_embd"])

    @property
    def ids(self) -> range:
        return range(self.size)

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(f"t{token}" for token in range(self.size))

    def state(self, prefix: Sequence[int]) -> Hashable:
        """Return what the row after a prefix depends on: all of it."""
        return tuple(prefix)

    def logits(self, prefix: Sequence[int]) -> NDArray[np.float32]:
        """Return `[size]`, read-only: the logits of the token after a prefix of at least one."""
        if not prefix:
            raise ValueError("A toy language has no logits for an empty text; give it one token.")
        key = tuple(prefix)
        if key not in self._rows:
            row = self._compute(key).astype(np.float32)
            row.flags.writeable = False
            self._rows[key] = row
        return self._rows[key]

    def joint(self, prefix: Sequence[int], *, length: int, policy: SamplingPolicy) -> Float:
        """Return the joint law of the next tokens, `[size] * length`, as shaped by a policy."""
        if length < 1 or self.size**length > MAX_JOINT:
            raise ValueError(f"The joint law of {length} tokens of {self.size} exceeds {MAX_JOINT} outcomes.")
        law = np.ones((self.size,) * length)
        for position in range(length):
            for head in itertools.product(range(self.size), repeat=position):
                probs = shaped(self.logits((*prefix, *head)), policy)
                row = np.zeros(self.size)
                row[list(probs)] = list(probs.values())
                law[head] *= row.reshape(-1, *(1,) * (length - 1 - position))
        return law

    def write_gguf(self, path: Path, *, end_token: int, four_bits: bool = False) -> Path:
        import gguf  # noqa: PLC0415 - only where a file is written

        from tests.support.tiny_gguf import new_gguf, write_gguf  # noqa: PLC0415 - likewise

        rows = [(word, gguf.TokenType.NORMAL) for word in self.words]
        writer = new_gguf(
            path, "llama", layers=1, width=_WIDTH, inner=_INNER, heads=_HEADS, kv_heads=1, context=CONTEXT, rows=rows,
            merges=["t 0"], bos=end_token, end=end_token, template=None,
        )  # fmt: skip
        writer.add_rope_freq_base(_ROPE_BASE)
        writer.add_vocab_size(self.size)
        for name, weight in self._weights.items():
            if four_bits:
                kind = gguf.GGMLQuantizationType.Q4_0
                writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
            else:
                writer.add_tensor(f"{name}.weight", weight)
        for name in _NORMS:
            writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, dtype=np.float32))
        write_gguf(writer)
        return path

    def _compute(self, tokens: tuple[int, ...]) -> Float:
        weights = {name: weight.astype(np.float64) for name, weight in self._weights.items()}
        hidden = weights["token_embd"][list(tokens)]
        inside = _normalised(hidden)
        queries = _rotated((inside @ weights["blk.0.attn_q"].T).reshape(len(tokens), _HEADS, _HEAD))
        keys = _rotated((inside @ weights["blk.0.attn_k"].T).reshape(len(tokens), 1, _HEAD))[:, 0]
        values = inside @ weights["blk.0.attn_v"].T
        scores = queries[-1] @ keys.T / _HEAD**0.5  # [heads, tokens]; only the last row is wanted
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        last = hidden[-1] + (shares @ values).reshape(-1) @ weights["blk.0.attn_output"].T
        inside = _normalised(last)
        gate = inside @ weights["blk.0.ffn_gate"].T
        gate = gate / (1.0 + np.exp(-gate)) * (inside @ weights["blk.0.ffn_up"].T)
        last = last + gate @ weights["blk.0.ffn_down"].T
        return np.asarray(_normalised(last) @ weights["output"].T)


def _normalised(hidden: Float) -> Float:
    return np.asarray(hidden / np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + _EPSILON))


def _rotated(heads: Float) -> Float:
    """Rotate pairs of neighbours `[tokens, heads, dim]` by position, as llama.cpp does for a Llama."""
    dim = heads.shape[-1]
    angles = np.arange(len(heads))[:, None] * _ROPE_BASE ** (-np.arange(0, dim, 2) / dim)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    even, odd = heads[..., 0::2], heads[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(heads.shape)
