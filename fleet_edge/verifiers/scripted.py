"""Scripted verifier: logits from a script, without a model, for tests, load and proofs of exactness."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fleet_common.grammar.process import GrammarTokenizer
from fleet_edge.verifiers.contract import CapacityExceeded, Item, TargetInfo, VerifierError
from fleet_edge.verifiers.sequences import SequenceTable
from schemas.vocabulary import Vocabulary


class Script(Protocol):
    """A language: logits for every prefix."""

    def logits(self, prefix: Sequence[int]) -> NDArray[Any]:
        """Return `[vocabulary]` for the token after the prefix."""


@runtime_checkable
class RowScript(Protocol):
    """A language of order one, whose rows are read off a table all at once."""

    def rows(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[Any]:
        """Return `[rows, vocabulary]`: the logits after `tokens`, each with `positions` tokens before what follows."""


class ScriptedVerifier:
    """`Verifier` over a script; it keeps the computed tokens, and holds callers to the same contract as a model."""

    def __init__(
        self,
        script: Script,
        words: Sequence[str],
        *,
        context: int = 4096,
        budget_tokens: int = 1 << 20,
        end_tokens: tuple[int, ...] = (),
        name: str = "scripted",
        least_tokens: int = 1,
    ) -> None:
        """Serve a script.

        Args:
            script: The language; one that is also a `RowScript` is read many rows at a time.
            words: One a token id; the vocabulary's fingerprint is over them.
            context: Most tokens in one sequence.
            budget_tokens: Most computed tokens in all sequences.
            end_tokens: Ids that end a text.
            name: For the log.
            least_tokens: As `TargetInfo` has it.
        """
        if budget_tokens < 1:
            raise VerifierError(f"A budget of {budget_tokens} tokens serves nothing; give at least {context}.")
        self._script = script
        self._words = tuple(words)
        self._budget = budget_tokens
        self._info = TargetInfo(name, Vocabulary.of(words), context, end_tokens, least_tokens=least_tokens)
        self._table = SequenceTable(context=context, vocabulary=len(words))
        self._tokens: dict[int, list[int]] = {}

    @property
    def info(self) -> TargetInfo:
        return self._info

    def grammar_tokenizer(self) -> GrammarTokenizer:
        """Return the words for grammars, each with a space behind it, as devices write them."""
        return GrammarTokenizer.of_words([f"{word} " for word in self._words], end_tokens=self._info.end_tokens)

    def encode(self, text: str) -> list[int]:
        """Return the ids of the words of a text; words of another language are left out."""
        ids = {word: token for token, word in enumerate(self._words)}
        return [ids[word] for word in text.split() if word in ids]

    def open(self, sequence: int) -> None:
        """Begin a sequence with nothing computed."""
        self._table.open(sequence)
        self._tokens[sequence] = []

    def fork(self, sequence: int, source: int, length: int) -> None:
        """Begin a sequence with the first tokens of another."""
        self._table.check_fork(sequence, source, length)
        if length > self.capacity():
            raise CapacityExceeded(
                f"The copy needs room for {length} tokens and the budget has {self.capacity()} left; evict a sequence "
                "and try again."
            )
        self._table.fork(sequence, source, length)
        self._tokens[sequence] = self._tokens[source][:length]

    def computed(self, sequence: int) -> int:
        """Return the number of tokens given so far."""
        return self._table.computed(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all tokens from `length` on."""
        self._table.truncate(sequence, length)
        del self._tokens[sequence][length:]

    def close(self, sequence: int) -> None:
        self._table.close(sequence)
        self._tokens.pop(sequence, None)

    def fits(self, items: Sequence[Item]) -> bool:
        """Return whether the budget has the items' tokens left."""
        return sum(len(item.tokens) for item in items) <= self.capacity()

    def capacity(self) -> int:
        """Return the number of tokens that the budget has left."""
        return self._budget - self._table.total

    def score(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Read off all items' rows; see `Verifier.score`."""
        self._table.check(items)
        if not self.fits(items):
            raise CapacityExceeded(
                f"The step needs room for {sum(len(item.tokens) for item in items)} tokens and the budget has "
                f"{self.capacity()} left; evict a sequence and try again."
            )
        for item in items:
            self._tokens[item.sequence].extend(item.tokens)
        self._table.commit(items)
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
