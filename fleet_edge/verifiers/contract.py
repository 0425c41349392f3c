"""Verifier contract: what the edge needs of an engine that runs the target model.

Prefill, resumption and verification are the same operation: a sequence has tokens it *knows* and tokens it has
*computed* (their keys and values are stored). A batch lists sequences, the tokens to compute next, and the number of
rows of logits wanted from their end.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fleet_common.grammar.tokenizer import GrammarTokenizer
from schemas.errors import FleetError
from schemas.fields import TARGET_ID_BYTES
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch  # an edge may do without it

Logits: TypeAlias = "NDArray[np.float32] | torch.Tensor"
"""float32 `[rows, vocabulary]`: an array, or a tensor on any device, with contiguous rows. It may be a view of the
verifier's memory, valid until the next `score`; callers must not change it."""


class VerifierError(FleetError):
    """Base of a verifier's errors. Its text is one sentence for the user."""


class UnsupportedModel(VerifierError):  # noqa: N818 - reads as what it says
    """This verifier cannot serve the model's architecture, or one of its files."""


HYBRIDS: Final = frozenset(
    (
        "qwen3next", "qwen35", "qwen35moe", "lfm2", "lfm2moe", "granitehybrid", "nemotron_h", "nemotron_h_moe",
        "falcon-h1",  # in a GGUF
        "qwen3_next", "qwen3_5_text", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "lfm2_moe", "granitemoehybrid",
        "falcon_h1",  # in a config.json
    )
)  # fmt: skip
"""Architectures in which some layers have a running state, and others keys and values."""

RUNNING_STATE: Final = HYBRIDS | {"mamba", "mamba2", "falcon_mamba", "jamba", "rwkv", "rwkv6", "rwkv7"}
"""Architectures with layers that have a running state; no engine serves those that are not hybrids."""


GEMMA2_CAPS: Final = {"attn": 50.0, "final": 30.0}
"""Bounds of the published Gemma 2, which transformers takes whatever a GGUF says."""


def running_state(kind: str, engine: str) -> UnsupportedModel:
    """Return the error that refuses such a model in an engine other than llama.cpp."""
    what = "set engine to llama.cpp and target to a GGUF of it"
    if kind not in HYBRIDS:
        what = "no other engine serves it either, so choose another target model"
    return UnsupportedModel(
        f"The engine {engine} cannot serve this {kind} model, because some layers have a running state; {what}."
    )


class CapacityExceeded(VerifierError):  # noqa: N818
    """The step needs more KV memory than the budget has; evict and try again."""


class TargetAway(VerifierError):  # noqa: N818
    """The target model cannot be reached; nothing was computed. Try the same step again after `retry_s` seconds."""

    def __init__(self, sentence: str, *, retry_s: float) -> None:
        super().__init__(sentence)
        self.retry_s = retry_s


class SequenceFailed(VerifierError):  # noqa: N818
    """One sequence of the step cannot be computed; nothing was computed. Try again without it."""

    def __init__(self, sentence: str, *, sequence: int) -> None:
        super().__init__(sentence)
        self.sequence = sequence


OnProgress = Callable[[float], None]
"""Receives the share of a target's bytes that is loaded, from any thread."""


def no_progress(_share: float) -> None:
    """Ignore progress."""


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """Identity and limits of the target model.

    Attributes:
        vocabulary: Size and fingerprint, without padding rows.
        context: Most tokens in one sequence.
        end_tokens: Ids that end a generation.
        runs_on: Device, number format and threads, for the log.
        max_top_k: Number of top logits known of a row, the others being minus infinity; policies that keep more cannot
            be served. None if all are known.
        min_step_tokens: Fewest new tokens of a sequence that a batch-invariant step computes; fewer cost as much.
        batch_invariant: Whether the rows of a stable item are bit-identical whatever is computed with it, and however
            its tokens are split into steps, so that seeded requests repeat.
        target_id: Identity of what the target computes; see `identified`. Empty until then.
    """

    name: str
    vocabulary: Vocabulary
    context: int
    end_tokens: tuple[int, ...]
    runs_on: str = ""
    max_top_k: int | None = None
    min_step_tokens: int = 1
    batch_invariant: bool = False
    target_id: bytes = b""

    def identified(self, *parts: bytes) -> "TargetInfo":
        """Return the same with the identity of the target.

        A request is continued only by an edge with the identity that it began with. So `parts` MUST differ where the
        weights or the arithmetic do, and MUST be the same on every machine: rows of a fixed sequence if they are
        bit-identical everywhere, else the weights' files (`weights_digest`), the engine and its number format.
        """
        ends = ",".join(map(str, self.end_tokens))
        digest = hashlib.sha256()
        for part in (self.vocabulary.fingerprint, ends.encode(), *parts):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return replace(self, target_id=digest.digest()[:TARGET_ID_BYTES])

    def serves(self, policy: SamplingPolicy) -> bool:
        """An engine that names `max_top_k` tokens of a row serves policies that keep no more, of unchanged logits."""
        bounded = policy.greedy or (self.max_top_k is not None and 0 < policy.top_k <= self.max_top_k)
        return self.max_top_k is None or (bounded and not policy.adjusts)


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence's part of a step.

    Attributes:
        rows: Logits wanted at the last `rows` of `tokens`: 0 for prefill, draft length + 1 to verify.
        stable: Whether to compute it batch-invariantly where the engine can, so that the generation is reproducible.
            Needed for all of its tokens.
    """

    sequence: int
    tokens: Sequence[int]
    rows: int
    stable: bool = True


class Verifier(Protocol):
    """The target model.

    Calls do not overlap, but come from different threads: `score` from a computing thread, the other methods between
    two steps. After `score` returns, `computed(sequence)` has grown by `len(item.tokens)`.
    """

    @property
    def info(self) -> TargetInfo: ...

    def open(self, sequence: int) -> None:
        """Begin a sequence with nothing computed. Takes no memory until tokens are computed."""

    def fork(self, sequence: int, source: int, length: int) -> None:
        """Begin a sequence with the first `length` computed tokens of another, independent from then on.

        Keys and values may be shared or copied; MUST cost far less than computing them.

        Raises:
            CapacityExceeded: There is no room for a copy; nothing has changed.
            VerifierError: `sequence` is open, `source` is not, or it has fewer computed tokens; nothing has changed.
        """

    def computed(self, sequence: int) -> int:
        """Number of tokens whose keys and values are stored."""

    def score(self, items: Sequence[Item]) -> Logits:
        """Compute all items in one forward pass.

        Returns:
            float32 logits `[sum of rows, vocabulary size]`, items in order, without padding rows. Row j of an item is
                the distribution of the token after its j-th of the last `rows` tokens. Valid until the next `score`.

        Raises:
            CapacityExceeded: There is no room; nothing was computed. MUST NOT be raised where `fits` says that there
                is, nor for at most `capacity()` tokens, unless the machine itself is out of memory.
            TargetAway: The target model cannot be reached.
            SequenceFailed: One sequence cannot be computed.
            VerifierError: An item is invalid: its sequence is not open or occurs twice, it exceeds the context, or it
                has an id outside the vocabulary; nothing was computed.
        """

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all computed tokens from `length` on. MUST be cheap: it happens at every rejection.

        Raises:
            VerifierError: The sequence is not open, or has fewer computed tokens.
        """

    def close(self, sequence: int) -> None:
        """End a sequence and free its memory; unknown ones are ignored."""

    def fits(self, items: Sequence[Item]) -> bool:
        """There is room for a step now; otherwise closing sequences makes room.

        With all other sequences closed, an item of any length up to the context MUST fit.
        """

    def capacity(self) -> int:
        """Number of tokens for which there is room now, for whichever open sequences.

        A lower bound: a verifier that rounds lengths up may have room for several times as many in few sequences.
        """


@runtime_checkable
class ProvidesTokenizer(Protocol):
    """A verifier that knows the strings of its target's tokens, so that grammars can be served."""

    def grammar_tokenizer(self) -> GrammarTokenizer:
        """Return the vocabulary for grammars. Takes a second; thread-safe, also during a step.

        Raises:
            GrammarUnavailable: A library is missing, or there is no usable tokenizer.
        """


@runtime_checkable
class SharesPrefixes(Protocol):
    """A verifier that shares prefixes itself."""

    def isolate(self, sequence: int, namespace: str) -> None:
        """Share a sequence's prefix within a namespace only; called before it computes anything."""


@dataclass(frozen=True, slots=True)
class KeptPrefix:
    """A sequence that an earlier process has computed, under a key of this one."""

    key: int
    owner: str
    tokens: "array[int]"
    age_s: float  # since it was used


@runtime_checkable
class KeepsPrefixes(Protocol):
    """A verifier whose keys and values may survive the process, where the settings say so."""

    def restore(self, keys: Iterator[int], *, keep_s: float) -> list[KeptPrefix]:
        """Open what an earlier process has left and used in the last `keep_s` seconds, the least recently used first.

        Called once, before all else. The rest is erased.
        """

    def own(self, sequence: int, owner: str) -> None:
        """Record the owner of an open sequence."""

    def erase_free(self) -> None:
        """Overwrite memory that closed sequences have left, some of it at each call."""

    @property
    def is_forgotten(self) -> bool:
        """An administrator has deleted what is kept: all ended sequences are to be closed."""


@runtime_checkable
class HasStates(Protocol):
    """A verifier that computes tokens of a fork again where it has no state of recurrent layers."""

    def reach(self, sequence: int, length: int) -> int:
        """Return the most tokens, up to `length`, that a fork of a sequence has without computing any again."""


@runtime_checkable
class DraftsItself(Protocol):
    """A verifier whose target model has a layer that proposes tokens, and is to draft with it."""

    def propose(self, tokens: Mapping[int, Sequence[int]]) -> Logits:
        """Return a row for each sequence: about the token that follows those given, which follow the computed ones.

        A sequence has one such token first, then each time one more. Nothing is computed or forgotten by this. There
        MUST be room for all of them, as `fits` says.
        """


@runtime_checkable
class RunsElsewhere(Protocol):
    """A verifier whose target model runs in other processes, which may be away. Thread-safe."""

    def away(self) -> str:
        """Return why nothing can be computed now; empty if it can."""

    def shut_down(self) -> None:
        """Release everything; nothing is called afterwards."""


class SequenceTable:
    """Open sequences with their computed lengths; shared so that all verifiers refuse the same calls alike."""

    def __init__(self, *, context: int, vocabulary: int) -> None:
        self._context = context
        self._vocabulary = vocabulary
        self._computed: dict[int, int] = {}
        self._total = 0

    @property
    def total(self) -> int:
        return self._total

    @property
    def lengths(self) -> Mapping[int, int]:
        return MappingProxyType(self._computed)

    def open(self, sequence: int) -> None:
        self._check_new(sequence)
        self._computed[sequence] = 0

    def fork(self, sequence: int, source: int, length: int) -> None:
        self.check_fork(sequence, source, length)
        self._computed[sequence] = length
        self._total += length

    def check_fork(self, sequence: int, source: int, length: int) -> None:
        computed = self.computed(source)
        if not 0 <= length <= computed:
            raise VerifierError(f"Sequence {source} has {computed} computed tokens and cannot pass on {length}.")
        self._check_new(sequence)

    def computed(self, sequence: int) -> int:
        try:
            return self._computed[sequence]
        except KeyError:
            raise VerifierError(f"Sequence {sequence} is not open.") from None

    def truncate(self, sequence: int, length: int) -> None:
        computed = self.computed(sequence)
        if not 0 <= length <= computed:
            raise VerifierError(f"Sequence {sequence} has {computed} computed tokens and cannot be cut to {length}.")
        self._computed[sequence] = length
        self._total -= computed - length

    def restore(self, sequence: int, length: int) -> None:
        """Begin with a sequence that has computed tokens already."""
        self.open(sequence)
        self._computed[sequence] = length
        self._total += length

    def close(self, sequence: int) -> bool:
        computed = self._computed.pop(sequence, None)
        self._total -= computed or 0
        return computed is not None

    def check(self, items: Sequence[Item]) -> None:
        """Check that the items of a step are valid, apart from memory; raises `VerifierError`."""
        for item in items:
            self._check(item)
        if len({item.sequence for item in items}) != len(items):
            raise VerifierError("A sequence occurs twice in one step.")

    def commit(self, items: Sequence[Item]) -> None:
        for item in items:
            self._computed[item.sequence] += len(item.tokens)
            self._total += len(item.tokens)

    def _check_new(self, sequence: int) -> None:
        if sequence in self._computed:
            raise VerifierError(f"Sequence {sequence} is open already; close it first.")

    def _check(self, item: Item) -> None:
        computed = self.computed(item.sequence)
        if not item.tokens:
            raise VerifierError(f"Sequence {item.sequence} has no tokens to compute in this step.")
        if not 0 <= item.rows <= len(item.tokens):
            raise VerifierError(f"Sequence {item.sequence} wants {item.rows} rows of {len(item.tokens)} tokens.")
        if computed + len(item.tokens) > self._context:
            raise VerifierError(
                f"Sequence {item.sequence} would have {computed + len(item.tokens)} tokens; "
                f"the target model's context holds {self._context}."
            )
        if min(item.tokens) < 0 or max(item.tokens) >= self._vocabulary:
            raise VerifierError(f"Sequence {item.sequence} has a token id outside 0..{self._vocabulary - 1}.")


class TableVerifier:
    """Base of a `Verifier` that keeps the lengths of its sequences in a table."""

    def __init__(self, info: TargetInfo) -> None:
        self._info = info
        self._table = SequenceTable(context=info.context, vocabulary=info.vocabulary.size)

    @property
    def info(self) -> TargetInfo:
        return self._info

    def open(self, sequence: int) -> None:
        self._table.open(sequence)

    def computed(self, sequence: int) -> int:
        return self._table.computed(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        self._table.truncate(sequence, length)


class TokenVerifier(TableVerifier):
    """Base of a `Verifier` that stores only the tokens of open sequences, within a budget of tokens."""

    def __init__(self, info: TargetInfo, budget: int) -> None:
        super().__init__(info)
        self._budget = budget
        self._tokens: dict[int, list[int]] = {}

    def open(self, sequence: int) -> None:
        super().open(sequence)
        self._tokens[sequence] = []

    def fork(self, sequence: int, source: int, length: int) -> None:
        self._table.check_fork(sequence, source, length)
        self._check_room(length)
        self._table.fork(sequence, source, length)
        self._tokens[sequence] = self._tokens[source][:length]

    def truncate(self, sequence: int, length: int) -> None:
        super().truncate(sequence, length)
        del self._tokens[sequence][length:]

    def close(self, sequence: int) -> None:
        self._table.close(sequence)
        self._tokens.pop(sequence, None)

    def fits(self, items: Sequence[Item]) -> bool:
        return sum(len(item.tokens) for item in items) <= self.capacity()

    def capacity(self) -> int:
        return self._budget - self._table.total

    def _check(self, items: Sequence[Item]) -> None:
        self._table.check(items)
        self._check_room(sum(len(item.tokens) for item in items))

    def _commit(self, items: Sequence[Item]) -> None:
        for item in items:
            self._tokens[item.sequence].extend(item.tokens)
        self._table.commit(items)

    def _check_room(self, tokens: int) -> None:
        if tokens > self.capacity():
            raise CapacityExceeded(
                f"{tokens} tokens need room and the budget leaves {self.capacity()}; evict a sequence and try again."
            )
