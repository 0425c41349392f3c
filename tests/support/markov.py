"""Markov toy language whose distribution is known in closed form, for tests, proofs and load.

The logits of a token depend on the token before it and, if asked for, on the position. The joint distribution of a few
tokens is a product of rows, so the output of the whole system can be tested against it exactly.
"""

from collections.abc import Hashable, Sequence
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from fleet_device.drafters.without_model import LogitsScript
from sampling.distribution import Float, Ids, shape
from sampling.drawing import coupled_token
from schemas.policy import SamplingPolicy
from tests.support.reference import shaped

MAX_TABLE: Final = 1 << 26
"""Most logits in a script: 256 MiB."""

MAX_JOINT: Final = 1 << 24
"""Most outcomes of a joint law: 128 MiB."""


def coupled_text(
    language: LogitsScript, prompt: Sequence[int], policy: SamplingPolicy, most: int, *, ends: Sequence[int] = ()
) -> list[int]:
    """Return the output that the seed and the target alone determine in coupled mode."""
    text: list[int] = []
    while len(text) < most and (not text or text[-1] not in ends):
        text.append(coupled_token(shape(language.logits((*prompt, *text)), policy), policy.seed, len(text)))
    return text


class MarkovScript:
    """A language of order one. Immutable; equal arguments make equal languages on one version of numpy."""

    def __init__(self, *, size: int, seed: int, sharpness: float = 2.0, period: int = 1) -> None:
        if size < 2 or period < 1 or not 0.0 <= sharpness < float("inf"):
            raise ValueError("A toy language needs two tokens or more, a period of 1 or more, a finite sharpness.")
        if period * size * size > MAX_TABLE:
            raise ValueError(f"A toy language of {size} tokens and period {period} exceeds {MAX_TABLE} logits.")
        normal = np.random.default_rng(seed).standard_normal((period, size, size), dtype=np.float32)
        self._table: NDArray[np.float32] = normal * np.float32(sharpness)

    @property
    def size(self) -> int:
        return int(self._table.shape[1])

    @property
    def period(self) -> int:
        return len(self._table)

    @property
    def ids(self) -> range:
        return range(self.size)

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(f"t{token}" for token in range(self.size))

    def perturbed(self, *, seed: int, amount: float) -> Self:
        """Return a language with normal noise added to every logit, as a draft model is to its target."""
        noise = np.random.default_rng(seed).standard_normal(self._table.shape, dtype=np.float32)
        other = object.__new__(type(self))
        other._table = self._table + noise * np.float32(amount)
        return other

    def shifted(self, token: int, amount: float) -> Self:
        """Return a language with an amount added to all logits of a token."""
        other = object.__new__(type(self))
        other._table = self._table.copy()
        other._table[:, :, token] += np.float32(amount)
        return other

    def state(self, prefix: Sequence[int]) -> Hashable:
        """Return what the row after a prefix depends on."""
        return len(prefix) % len(self._table), prefix[-1]

    def logits(self, prefix: Sequence[int]) -> NDArray[np.float32]:
        """Return `[size]`, read-only: the logits of the token after a prefix of at least one."""
        if not prefix:
            raise ValueError("A toy language has no logits for an empty text; give it one token.")
        row: NDArray[np.float32] = self._table[len(prefix) % len(self._table), prefix[-1]].view()
        row.flags.writeable = False
        return row

    def rows(self, tokens: Ids, positions: Ids) -> NDArray[np.float32]:
        """Return `[rows, size]`: the logits of the tokens after `tokens`."""
        return self._table[positions % len(self._table), tokens]

    def joint(self, prefix: Sequence[int], *, length: int, policy: SamplingPolicy) -> Float:
        """Return the joint law of the next tokens, `[size] * length`, as shaped by a policy."""
        if length < 1 or self.size**length > MAX_JOINT:
            raise ValueError(f"The joint law of {length} tokens of {self.size} exceeds {MAX_JOINT} outcomes.")
        law = self._law(self.logits(prefix), policy)
        for offset in range(1, length):
            position = len(prefix) + offset
            step = [self._law(row, policy) for row in self._table[position % len(self._table)]]
            law = law[..., np.newaxis] * np.stack(step)
        return law

    def _law(self, row: NDArray[np.float32], policy: SamplingPolicy) -> Float:
        probs = shaped(row, policy)
        law = np.zeros(self.size)
        law[list(probs)] = list(probs.values())
        return law


class SpreadScript:
    """A language of order one whose tokens have large ids, among many that never occur; the first keeps its id."""

    def __init__(self, language: MarkovScript, *, size: int, first: int, step: int) -> None:
        self._language = language
        self.size = size
        self.ids = (0, *range(first + step, first + step * language.size, step))
        self.words = tuple(f"t{token}" for token in range(size))
        self._places = {token: place for place, token in enumerate(self.ids)}
        self._rows: dict[Hashable, NDArray[np.float32]] = {}

    def state(self, prefix: Sequence[int]) -> Hashable:
        return self._language.state(self._inner(prefix))

    def logits(self, prefix: Sequence[int]) -> NDArray[np.float32]:
        """Return `[size]`, read-only: minus infinity for tokens that never occur."""
        state = self.state(prefix)
        if state not in self._rows:
            row = np.full(self.size, -np.inf, dtype=np.float32)
            row[list(self.ids)] = self._language.logits(self._inner(prefix))
            row.flags.writeable = False
            self._rows[state] = row
        return self._rows[state]

    def joint(self, prefix: Sequence[int], *, length: int, policy: SamplingPolicy) -> Float:
        """Return the joint law of the next tokens, `[tokens that occur] * length`."""
        return self._language.joint(self._inner(prefix), length=length, policy=policy)

    def _inner(self, prefix: Sequence[int]) -> list[int]:
        # Only the last token and the length count.
        return [*[0] * (len(prefix) - 1), self._places[prefix[-1]]]
