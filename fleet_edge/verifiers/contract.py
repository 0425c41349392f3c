"""Verifier contract: what the orchestrator needs of a target model.

One idea unifies prefill, resume and verification: a sequence has tokens it *knows* and tokens it has
*computed* (their keys and values are stored). A batch is a list of sequences with the tokens to compute next,
and the number of rows of logits wanted from their end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fleet_common.grammar.process import GrammarTokenizer
from schemas.errors import FleetError
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch  # an edge may do without it

Logits: TypeAlias = "NDArray[np.float32] | torch.Tensor"
"""float32 `[rows, vocabulary]`: an array, or a tensor on any device. It may be a view of the verifier's own memory,
which is valid until the next `score`; a row's elements lie side by side, and whoever is given it changes nothing."""


class VerifierError(FleetError):
    """Base of a verifier's errors. Its text is one sentence for the user."""


class UnsupportedModel(VerifierError):  # noqa: N818 - reads as what it says
    """The model's architecture, or a file of it, is not one that this verifier can serve."""


class CapacityExceeded(VerifierError):  # noqa: N818
    """The step needs more memory for keys and values than the budget has; evict and try again."""


class TargetAway(VerifierError):  # noqa: N818
    """What computes the target model cannot be reached; nothing was computed. The same step may succeed later.

    Attributes:
        retry_s: Seconds after which that is worth a trial.
    """

    def __init__(self, sentence: str, *, retry_s: float) -> None:
        super().__init__(sentence)
        self.retry_s = retry_s


class SequenceFailed(VerifierError):  # noqa: N818
    """One sequence of the step cannot be computed; nothing was computed, and the others may come again without it.

    Attributes:
        sequence: Its key.
    """

    def __init__(self, sentence: str, *, sequence: int) -> None:
        super().__init__(sentence)
        self.sequence = sequence


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """What the rest of the edge must know of the target model.

    Attributes:
        name: For the log.
        vocabulary: Size and fingerprint, padding rows left out.
        context: Most tokens in one sequence.
        end_tokens: Ids that end a text.
        runs_on: Device, number format and threads, for the log; empty where nothing is computed.
        most_top_k: How many of a row's largest logits are known, where the others are given as minus infinity: policies
            that keep more cannot be served. None where all are.
        least_tokens: New tokens of a sequence that a step with stable items costs at least: fewer take as long.
        batch_invariant: Whether the rows of a stable item are the same to the bit whatever is computed with it, however
            its tokens are cut into steps, so that seeded requests repeat.
    """

    name: str
    vocabulary: Vocabulary
    context: int
    end_tokens: tuple[int, ...]
    runs_on: str = ""
    most_top_k: int | None = None
    least_tokens: int = 1
    batch_invariant: bool = False

    def serves(self, policy: SamplingPolicy) -> bool:
        """Whether enough of a row is known to shape it by a policy."""
        return self.most_top_k is None or policy.greedy or 0 < policy.top_k <= self.most_top_k


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence's part of a step.

    Attributes:
        sequence: Its key, as opened.
        tokens: Token ids to compute, following those already computed. At least one.
        rows: Logits wanted at the last `rows` of `tokens`: 0 for prefill, draft length + 1 to verify.
        stable: Whether the same text should have the same rows whatever is computed with it, where the engine can do
            so: worth its price where a text is to repeat, which needs that of all of its tokens.
    """

    sequence: int
    tokens: Sequence[int]
    rows: int
    stable: bool = True


class Verifier(Protocol):
    """The target model.

    One call comes after the other, but not from one thread: an edge has steps computed on a thread of their own, and
    calls the other methods between two steps. After `score` returns, `computed(sequence)` has grown by
    `len(item.tokens)`.
    """

    @property
    def info(self) -> TargetInfo:
        """The target model's identity and limits."""

    def open(self, sequence: int) -> None:
        """Begin a sequence with nothing computed. Costs no memory until tokens are computed."""

    def fork(self, sequence: int, source: int, length: int) -> None:
        """Begin a sequence with the first `length` tokens of another already computed.

        Both are independent from then on. Keys and values may be shared or copied; MUST cost far less than computing
        them.

        Args:
            sequence: Its key; it MUST NOT be open.
            source: Another, which goes on as it was.
            length: 0 to the computed tokens of `source`.

        Raises:
            CapacityExceeded: There is no room for a copy; nothing has changed.
            VerifierError: `sequence` is open, `source` is not, or it has fewer computed tokens; nothing has changed.
        """

    def computed(self, sequence: int) -> int:
        """Number of tokens whose keys and values are stored."""

    def score(self, items: Sequence[Item]) -> Logits:
        """Compute all items in one forward pass.

        Returns:
            float32 logits `[sum of rows, vocabulary size]`, items in order, padding rows cut off. Row j of an
            item is the distribution of the token after its j-th of the last `rows` tokens. Valid until the next
            `score`.

        Raises:
            CapacityExceeded: There is no room for the new tokens; nothing was computed. MUST NOT be raised
                where `fits` says that there is, nor while the items have no more tokens than `capacity()`
                says, unless the machine itself is out of memory.
            TargetAway: What computes is away.
            SequenceFailed: One sequence cannot be computed where it is computed.
            VerifierError: An item is not one that can be computed: its sequence is not open or occurs twice,
                it exceeds the context, or it has an id outside the vocabulary; nothing was computed.
        """

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all computed tokens from `length` on. MUST be cheap: it happens at every rejection.

        Raises:
            VerifierError: The sequence is not open, or has fewer computed tokens.
        """

    def close(self, sequence: int) -> None:
        """End a sequence and free its memory; unknown ones are ignored."""

    def fits(self, items: Sequence[Item]) -> bool:
        """Whether there is room for a step now. Where there is not, closing sequences makes room.

        With all other sequences closed an item of any length up to the context MUST fit.
        """

    def capacity(self) -> int:
        """Tokens for which there is room now, on top of those computed, whichever open sequences they are for.

        A lower bound: a verifier that rounds lengths up may have room for several times as many, if they are few
        sequences'.
        """


@runtime_checkable
class KnowsTokens(Protocol):
    """A verifier that can say what its target's tokens read, so that texts may have grammars."""

    def grammar_tokenizer(self) -> GrammarTokenizer:
        """Return the vocabulary as grammars need it. Takes a second; callable on any thread, while a step is computed.

        Raises:
            GrammarUnavailable: A library is missing, or there is no tokenizer that it can use.
        """


@runtime_checkable
class ReadsText(Protocol):
    """A verifier that has the target's tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        """Return the ids of a text; control tokens are recognised in it, and none is added.

        Raises:
            VerifierError: The tokenizer cannot be read.
        """


@runtime_checkable
class SharesPrefixes(Protocol):
    """A verifier over a cache that shares what sequences begin with."""

    def isolate(self, sequence: int, namespace: str) -> None:
        """Let a sequence share with those of the same namespace alone; called before it computes anything."""


@runtime_checkable
class RunsElsewhere(Protocol):
    """A verifier whose target model runs in other processes, which may be away for a time. Callable on any thread."""

    def away(self) -> str:
        """Return why nothing can be computed now, in a sentence; empty if it can."""

    def shut_down(self) -> None:
        """Let go of what computes; nothing else is called afterwards."""
