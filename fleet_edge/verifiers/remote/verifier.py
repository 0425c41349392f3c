"""Remote verifier: the most likely tokens of each row from an inference server; all others count as impossible.

So it is exact for policies that keep no more tokens than the server names: greedy, or `0 < top_k <= most_top_k`. Where
several tokens are equally likely at the last place that is named, the server has chosen among them, as it would for a
text of its own; which it chooses does not depend on the draft, so that the law stands.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleet_edge.verifiers.contract import CapacityExceeded, Item, TargetAway, TargetInfo, VerifierError
from fleet_edge.verifiers.remote.client import Client
from fleet_edge.verifiers.remote.dialect import Question
from fleet_edge.verifiers.remote.endpoint import Identity
from fleet_edge.verifiers.remote.loop import LoopThread
from fleet_edge.verifiers.remote.pool import Pool
from fleet_edge.verifiers.remote.tokenizer import LocalTokens
from fleet_edge.verifiers.sequences import SequenceTable
from schemas.vocabulary import Vocabulary

__all__ = ["RemoteVerifier"]

# Beyond a step's own bound: the loop's thread may be kept from running.
_LATE_S: Final = 5.0
_CLOSE_S: Final = 5.0


class RemoteVerifier:
    """`Verifier` over inference servers. It keeps the tokens of open sequences, and nothing else of them.

    Args:
        local: Vocabulary and end tokens.
        pool: The servers, started.
        client: Their connections.
        loop: Where they run.
        identity: What the servers are.
        runs_on: For the log.
        top: Entries of a row that are known.
        known_tokens: Most tokens of all sequences.
        step_s: Bound of a step.
    """

    def __init__(
        self,
        *,
        local: LocalTokens,
        pool: Pool,
        client: Client,
        loop: LoopThread,
        identity: Identity,
        runs_on: str,
        top: int,
        known_tokens: int,
        step_s: float,
    ) -> None:
        size = len(local.strings)
        if known_tokens < identity.context:
            raise VerifierError(
                f"Room for {known_tokens} tokens is less than one text may have; set 'remote.known_tokens' to at least "
                f"{identity.context}."
            )
        self._pool = pool
        self._client = client
        self._loop = loop
        self._top = top
        self._budget = known_tokens
        self._step_s = step_s
        self._info = TargetInfo(
            name=local.name,
            vocabulary=Vocabulary.of(local.strings),
            context=identity.context,
            end_tokens=tuple(end for end in local.end_tokens if end < size),
            runs_on=runs_on,
            most_top_k=top if top < size else None,
        )
        self._table = SequenceTable(context=identity.context, vocabulary=size)
        self._tokens: dict[int, list[int]] = {}

    @property
    def info(self) -> TargetInfo:
        """The target model's identity and limits."""
        return self._info

    def open(self, sequence: int) -> None:
        """Begin a sequence with nothing computed."""
        self._table.open(sequence)
        self._tokens[sequence] = []

    def fork(self, sequence: int, source: int, length: int) -> None:
        """Begin a sequence with the first tokens of another, where they are cached if that server has room."""
        self._table.check_fork(sequence, source, length)
        if length > self.capacity():
            raise CapacityExceeded(
                f"The copy needs room for {length} tokens and 'remote.known_tokens' leaves {self.capacity()}; evict a "
                "sequence and try again."
            )
        self._table.fork(sequence, source, length)
        self._tokens[sequence] = self._tokens[source][:length]
        self._loop.call(self._pool.follow, sequence, source)

    def computed(self, sequence: int) -> int:
        """Return the number of tokens that were sent to be computed."""
        return self._table.computed(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all tokens from `length` on; what a server has cached of them it drops by itself."""
        self._table.truncate(sequence, length)
        del self._tokens[sequence][length:]

    def close(self, sequence: int) -> None:
        """End a sequence."""
        if self._table.close(sequence):
            del self._tokens[sequence]
            self._loop.call(self._pool.forget, sequence)

    def fits(self, items: Sequence[Item]) -> bool:
        """Return whether there is room for the items' tokens."""
        return sum(len(item.tokens) for item in items) <= self.capacity()

    def capacity(self) -> int:
        """Return the number of tokens for which there is room."""
        return self._budget - self._table.total

    def score(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """Have all items computed; see `Verifier.score`."""
        self._table.check(items)
        if not self.fits(items):
            raise CapacityExceeded(
                f"The step needs room for {sum(len(item.tokens) for item in items)} tokens and 'remote.known_tokens' "
                f"leaves {self.capacity()}; evict a sequence and try again."
            )
        questions = {
            item.sequence: Question([*self._tokens[item.sequence], *item.tokens], item.rows, self._top)
            for item in items
        }
        logits = np.full((sum(item.rows for item in items), self._info.vocabulary.size), -np.inf, dtype=np.float32)
        if not questions:
            return logits
        try:
            answers = self._loop.run(self._pool.score(questions), timeout_s=self._step_s + _LATE_S)
        except TimeoutError as error:
            raise TargetAway("The inference servers' answers could not be read in time.", retry_s=1.0) from error
        start = 0
        for item in items:
            rows = answers[item.sequence]
            np.put_along_axis(logits[start : start + item.rows], rows.ids, rows.logprobs, axis=1)
            start += item.rows
        for item in items:
            self._tokens[item.sequence].extend(item.tokens)
        self._table.commit(items)
        return logits

    # As `RunsElsewhere`

    def away(self) -> str:
        """Return why nothing can be computed now; empty if it can."""
        return self._pool.away

    def shut_down(self) -> None:
        """Let go of the servers."""
        try:
            self._loop.run(self._end(), timeout_s=_CLOSE_S)
        except (TimeoutError, RuntimeError):
            pass
        finally:
            self._loop.stop()

    async def _end(self) -> None:
        await self._pool.close()
        await self._client.close()
