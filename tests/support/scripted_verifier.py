"""Scripted verifier: logits from a script instead of a model, for load tests and proofs of exactness."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_edge.verifiers.contract import Item, TargetInfo, TokenVerifier, VerifierError
from schemas.vocabulary import Vocabulary


class LogitScript(Protocol):
    """A language: logits for every prefix."""

    def logits(self, prefix: Sequence[int]) -> NDArray[Any]:
        """Return the logits `[vocabulary]` of the token after the prefix."""


@runtime_checkable
class RowScript(Protocol):
    """A language of order one, whose rows can be read from a table all at once."""

    def rows(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[Any]:
        """Return logits `[rows, vocabulary]` after each of `tokens`, with `positions` tokens before what follows."""


class ScriptedVerifier(TokenVerifier):
    """`Verifier` over a script; it enforces the same contract as a model."""

    def __init__(
        self,
        script: LogitScript,
        words: Sequence[str],
        *,
        context: int = 4096,
        budget_tokens: int = 1 << 20,
        end_tokens: tuple[int, ...] = (),
        name: str = "scripted",
        min_step_tokens: int = 1,
    ) -> None:
        """Serve a script, `words` for its token ids, and at most `budget_tokens` computed tokens of all sequences.

        A `RowScript` is read many rows at a time.
        """
        if budget_tokens < 1:
            raise VerifierError(f"A budget of {budget_tokens} tokens serves nothing; give at least {context}.")
        super().__init__(
            TargetInfo(name, Vocabulary.of(words), context, end_tokens, min_step_tokens=min_step_tokens).identified(
                name.encode()
            ),
            budget_tokens,
        )
        self._script = script
        self._words = tuple(words)

    def grammar_tokenizer(self) -> GrammarTokenizer:
        """Return the words for grammars, each followed by a space, as devices write them."""
        return GrammarTokenizer.of_words([f"{word} " for word in self._words], end_tokens=self._info.end_tokens)

    def score(self, items: Sequence[Item]) -> NDArray[np.float32]:
        self._check(items)
        self._commit(items)
        rows = self._rows(items)
        wanted = (sum(item.rows for item in items), self._info.vocabulary.size)
        if rows.shape != wanted:
            raise VerifierError(f"The script gives logits of shape {rows.shape} where {wanted} was asked for.")
        return rows

    def _rows(self, items: Sequence[Item]) -> NDArray[np.float32]:
        if not any(item.rows for item in items):
            return np.empty((0, self._info.vocabulary.size), dtype=np.float32)
        if isinstance(self._script, RowScript):
            tokens: list[int] = []
            positions: list[int] = []
            for item in items:
                end = self._table.computed(item.sequence)
                tokens.extend(self._tokens[item.sequence][end - item.rows :])
                positions.extend(range(end - item.rows + 1, end + 1))
            found = self._script.rows(np.array(tokens, dtype=np.int64), np.array(positions, dtype=np.int64))
        else:
            found = np.stack(
                [
                    self._script.logits(self._tokens[item.sequence][:end])
                    for item in items
                    for end in range(
                        self._table.computed(item.sequence) - item.rows + 1, self._table.computed(item.sequence) + 1
                    )
                ]
            )
        return np.ascontiguousarray(found, dtype=np.float32)
