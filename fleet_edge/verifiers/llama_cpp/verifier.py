"""llama.cpp verifier: the contract for a GGUF, on llama.cpp's low-level interface.

A sequence gets a stream with its first computed token, and moves where that saves passes over the weights (see
`streams`). A step's tokens are cut into calls (see `layout`), and only wanted rows have logits.
"""

import itertools
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_common.extras import install_command
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.llama_trial import require_trial
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import (
    CapacityExceeded,
    Item,
    SequenceFailed,
    TableVerifier,
    TargetInfo,
    UnsupportedModel,
    Verifier,
    VerifierError,
)
from fleet_edge.verifiers.llama_cpp.hybrid import HybridVerifier
from fleet_edge.verifiers.llama_cpp.layout import Call, CallLimits, StreamPart, cost, lay_out
from fleet_edge.verifiers.llama_cpp.slab import GgufTarget, LlamaSlab, open_target
from fleet_edge.verifiers.llama_cpp.streams import (
    ActiveSequences,
    StreamPlace,
    StreamTable,
    cheapest_moves,
    size_streams,
)
from fleet_edge.verifiers.source import check_source, is_gguf, weights_digest

_LENGTH: Final = 24
_SEED: Final = 20_261_125

_TOLERANCE: Final = 0.1
"""Limit of the error in a trial, as RMS difference over the standard deviation of the logits. Kernels for few and for
many tokens differ by about 1e-2; a wrong rollback gives 0.1 to 1."""

_REPEATS: Final = 3
_MANY: Final = 17
_MOST_CALL_TOKENS: Final = 64.0


def run_trial(verifier: Verifier) -> None:
    """Check that rows do not depend on how a sequence was split, rolled back, copied and batched.

    Raises `UnsupportedModel` if they do, or the model cannot be rolled back.
    """
    length = min(_LENGTH, verifier.info.context - 1)
    text = random.Random(_SEED).choices(range(verifier.info.vocabulary.size), k=length)  # noqa: S311 - no secret
    cut = length // 3
    first, second, third = -1, -2, -3  # no session has these
    try:
        verifier.open(first)
        whole = _rows(verifier, [Item(first, text, length - cut)])
        verifier.close(first)
        verifier.open(first)
        verifier.score([Item(first, text[:cut], 0)])
        verifier.score([Item(first, text[1 : cut + 1], 1)])
        verifier.truncate(first, cut)
        cut_rows = _rows(verifier, [Item(first, text[cut:], length - cut)])
        pairs = [(whole, cut_rows)]
        if verifier.fits([Item(second, [0], 0)]):
            verifier.fork(second, first, cut + 1)
            pairs.append((whole[1:], _rows(verifier, [Item(second, text[cut + 1 :], length - cut - 1)])))
    finally:
        for sequence in (first, second, third):
            verifier.close(sequence)
    for one, other in pairs:
        distance = float(np.sqrt(np.square(one - other).mean()) / max(one.std(), 1e-9))
        if not distance <= _TOLERANCE:  # also if it is not a number
            raise UnsupportedModel(
                f"{verifier.info.name} cannot be served: in a trial run its logits after a rollback were off by "
                f"{distance:.1e} of their spread; choose another target model, or the engine torch."
            )


def measure_call_tokens(verifier: Verifier, clock: Callable[[], float]) -> float:
    """Return the cost of a pass over the weights in tokens, 1 to 64."""
    sequence = -1
    many = min(_MANY, verifier.info.context - 1)
    verifier.open(sequence)
    try:
        verifier.score([Item(sequence, [0], 0)])
        one_s, many_s = (_seconds(verifier, sequence, count, clock) for count in (1, many))
    finally:
        verifier.close(sequence)
    token_s = (many_s - one_s) / max(1, many - 1)
    if token_s * _MOST_CALL_TOKENS <= one_s:
        return _MOST_CALL_TOKENS
    return max(1.0, one_s / token_s - 1.0)


def _seconds(verifier: Verifier, sequence: int, count: int, clock: Callable[[], float]) -> float:
    least = float("inf")
    for _ in range(_REPEATS):
        before = clock()
        verifier.score([Item(sequence, [0] * count, 1)])
        least = min(least, clock() - before)
        verifier.truncate(sequence, 1)
    return least


def _rows(verifier: Verifier, items: Sequence[Item]) -> NDArray[np.float32]:
    found: Any = verifier.score(items)
    return np.array(found, dtype=np.float32)


_FEWEST_TOKENS: Final = 256

_ALIKE: Final = 2
"""Fewest new tokens of a stream that llama.cpp computes batch-invariantly."""


class LlamaCppVerifier(TableVerifier):
    def __init__(
        self, target: GgufTarget, *, budget_bytes: int, context: int = 0, threads: int = 0, batch_invariant: bool = True
    ) -> None:
        """Prepare a model, and check that it can be served.

        The KV budget is divided into streams of `info.context` tokens. `context` 0 means the model's own, or fewer
        where the budget holds few such sequences; `threads` 0 means all usable cores. `batch_invariant` uses CPU
        kernels whose results do not depend on the batch, for the items that ask for it. Raises `UnsupportedModel` if
        the model cannot be rolled back or its rows depend on the batch, `VerifierError` if the budget is too small.
        """
        self._target = target
        threads = threads or len(os.sched_getaffinity(0))
        sizes = size_streams(
            budget_bytes=budget_bytes,
            token_bytes=target.token_kv_bytes,
            trained=target.context or budget_bytes,
            wanted=context,
            width=target.rows,
            heads=0 if target.on_gpu else target.heads,
            threads=threads,
        )
        if sizes is None:
            raise VerifierError(
                f"The budget of {budget_bytes} bytes for keys and values holds no sequence of "
                f"{target.name}; set kv_bytes "
                f"to at least {_FEWEST_TOKENS * target.token_kv_bytes}."
            )
        self._sizes = sizes
        self._batch_invariant = batch_invariant
        super().__init__(
            TargetInfo(
                name=target.name,
                vocabulary=target.vocabulary,
                context=sizes.context,
                end_tokens=target.end_tokens,
                runs_on=f"llama.cpp, {target.quantization}, {threads} threads, {sizes.streams} sequences at a time",
                least_tokens=_ALIKE if batch_invariant else 1,
                batch_invariant=batch_invariant and not target.on_gpu,
            ).identified(b"llama.cpp", weights_digest(target.path))
        )
        self._streams = StreamTable(
            sizes, lambda: target.thread.call(LlamaSlab, target, sizes.shape), spare=bool(target.window)
        )
        self._active = ActiveSequences()
        self._debt = 0.0  # cost of missing neighbours since the last move, in tokens
        self._logits = np.empty((0, target.rows), dtype=np.float32)
        self._call_tokens = 1.0
        run_trial(self)
        self._call_tokens = measure_call_tokens(self, time.perf_counter)

    @property
    def allocated_bytes(self) -> int:
        """KV memory allocated; never more than the budget."""
        shape = self._sizes.shape
        return len(self._streams.slabs) * shape.streams * shape.cells * self._target.token_kv_bytes

    def grammar_tokenizer(self) -> GrammarTokenizer:
        return self._target.grammar_tokenizer()

    def fork(self, sequence: int, source: int, length: int) -> None:
        place = self._streams.places.get(source)
        # With a sliding window, only a copy of a whole stream holds all that a rollback needs.
        near = place.slab if place is not None and self._target.window else None
        self._table.fork(sequence, source, length)
        if not length:
            return
        assert place is not None
        if not (self._streams.free if near is None else self._streams.has_free(near)):
            self._table.close(sequence)
            raise CapacityExceeded("There is no stream left for a copy; evict a sequence and try again.")
        try:
            mine = self._take(sequence, slab=near)
            self._copy(place, mine, length)
        except BaseException:
            self.close(sequence)
            raise

    def truncate(self, sequence: int, length: int) -> None:
        self._table.truncate(sequence, length)
        place = self._streams.places.get(sequence)
        if place is not None:
            self._streams.slabs[place.slab].cut(place.stream, length)

    def close(self, sequence: int) -> None:
        self._table.close(sequence)
        self._active.forget(sequence)
        place = self._streams.give_back(sequence)
        if place is not None:
            self._streams.slabs[place.slab].cut(place.stream, 0)

    def fits(self, items: Sequence[Item]) -> bool:
        return self._missing(items) <= 0

    def capacity(self) -> int:
        places, lengths = self._streams.places, self._table.lengths
        free = self._streams.free
        if len(lengths) - len(places) > free:
            return free  # sequences without a stream may need one each
        return free * self._info.context + sum(self._info.context - lengths[sequence] for sequence in places)

    def score(self, items: Sequence[Item]) -> NDArray[np.float32]:
        self._table.check(items)
        missing = self._missing(items)
        if missing > 0:
            raise CapacityExceeded(f"The step is {missing} streams short; evict a sequence and try again.")
        size = self._info.vocabulary.size
        if not items:
            return np.empty((0, size), dtype=np.float32)
        self._check_kept(item for item in items if self._table.computed(item.sequence))
        try:
            for item in items:
                if item.sequence not in self._streams.places:
                    self._take(item.sequence)
            self._active.step(item.sequence for item in items)
            logits = self._target.thread.call(self._compute, items)
        except BaseException:
            self._take_back(items)
            raise
        self._table.commit(items)
        return logits[:, :size]

    def _missing(self, items: Sequence[Item]) -> int:
        places = self._streams.places
        return sum(item.sequence not in places for item in items) - self._streams.free

    def _check_kept(self, items: Iterable[Item]) -> None:
        for item in items:
            if item.sequence not in self._streams.places:
                raise SequenceFailed(
                    "The computed tokens of a request are lost: llama.cpp could not move them.", sequence=item.sequence
                )

    def _take(self, sequence: int, *, slab: int | None = None) -> StreamPlace:
        place = self._streams.assign(sequence, active=self._active_streams(), slab=slab)
        self._active.began(sequence)
        return place

    def _active_streams(self) -> list[int]:
        number = self._streams.number
        return sorted(number(place) for sequence, place in self._streams.places.items() if sequence in self._active)

    def _compute(self, items: Sequence[Item]) -> NDArray[np.float32]:
        self._gather(items)
        self._check_kept(items)
        by_slab: dict[int, dict[int, int]] = defaultdict(dict)  # slab -> stream -> number of the item
        for index, item in enumerate(items):
            place = self._streams.places[item.sequence]
            by_slab[place.slab][place.stream] = index
        # An item's rows come in order, possibly in several calls.
        next_row = [0, *itertools.accumulate(item.rows for item in items)]
        total = next_row.pop()
        if len(self._logits) < total:  # reused: allocation costs as much as copying
            self._logits = np.empty((total, self._target.rows), dtype=np.float32)
        logits = self._logits[:total]
        for number, index_of in by_slab.items():
            lengths = self._lengths(number)
            tokens = {stream: items[index].tokens for stream, index in index_of.items()}
            rows = {stream: items[index].rows for stream, index in index_of.items()}
            parts = [
                StreamPart(stream, len(items[index].tokens), items[index].rows) for stream, index in index_of.items()
            ]
            calls = self._calls(parts, lengths, stable=any(items[index].stable for index in index_of.values()))
            for call in calls:
                found = self._streams.slabs[number].decode(call, tokens=tokens, starts=lengths, rows=rows)
                if len(calls) == len(by_slab) == 1 and list(index_of) == sorted(index_of):
                    return found  # all rows in order: no copy needed
                at = 0
                for share in call:
                    count = share.wanted(len(tokens.get(share.stream, ())), rows.get(share.stream, 0))
                    if count:
                        row = next_row[index_of[share.stream]]
                        logits[row : row + count] = found[at : at + count]
                        next_row[index_of[share.stream]] += count
                        at += count
        return logits

    def _calls(self, parts: Sequence[StreamPart], lengths: Mapping[int, int], *, stable: bool) -> list[Call]:
        shape = self._sizes.shape
        # On a CPU llama.cpp uses other kernels for a stream's single token than for several, which round alike in any
        # number: with `_ALIKE` rows are bit-identical for the same text.
        least = _ALIKE if self._batch_invariant and stable else 1
        return lay_out(
            parts,
            room={stream: shape.cells - length for stream, length in lengths.items()},
            call_tokens=self._call_tokens,
            limits=CallLimits(shape.tokens, shape.rows, shape.tokens, least),
        )

    def _gather(self, items: Sequence[Item]) -> None:
        """Move the active sequences together once steps have lost more than that costs."""
        slab = self._sizes.shape.streams
        active = self._active_streams()
        if active[-1] - active[0] < len(active) <= slab and active[0] // slab == active[-1] // slab:
            return
        number = {item.sequence: self._streams.number(self._streams.places[item.sequence]) for item in items}
        lengths = {self._streams.number(place): self._table.computed(s) for s, place in self._streams.places.items()}
        gathered = {stream: place for place, stream in enumerate(active)}
        now = self._cost(items, number, lengths)
        then = self._cost(
            items,
            {sequence: gathered[stream] for sequence, stream in number.items()},
            {place: lengths[stream] for stream, place in gathered.items()},
        )
        self._debt += max(0.0, now - then)
        if self._debt <= 0.0:
            return
        copied = dict.fromkeys(lengths, self._sizes.shape.cells) if self._target.window else lengths
        moves = cheapest_moves(active, lengths=copied, begins=self._streams.begins(len(active)))
        if moves is None or self._debt < moves.price:
            return
        self._debt = 0.0
        for pair in moves.pairs:
            self._exchange(*map(self._streams.place, pair))

    def _cost(self, items: Sequence[Item], number: Mapping[int, int], lengths: Mapping[int, int]) -> float:
        """Return the cost of a step in tokens if its sequences were in these streams."""
        slab = self._sizes.shape.streams
        parts: dict[int, list[StreamPart]] = defaultdict(list)
        for item in items:
            which, stream = divmod(number[item.sequence], slab)
            parts[which].append(StreamPart(stream, len(item.tokens), item.rows))
        stable = any(item.stable for item in items)
        return sum(
            cost(
                self._calls(each, {s: lengths.get(which * slab + s, 0) for s in range(slab)}, stable=stable),
                self._call_tokens,
            )
            for which, each in parts.items()
        )

    def _exchange(self, first: StreamPlace, second: StreamPlace) -> None:
        """Exchange the sequences of two streams, the first possibly empty."""
        if self._target.window:
            self._exchange_whole(first, second)
            return
        owners = {place: sequence for sequence, place in self._streams.places.items()}
        slabs = self._streams.slabs
        places = [place for place in (first, second) if place in owners]
        saved = [slabs[place.slab].save(place.stream) for place in places]
        for place in places:
            slabs[place.slab].cut(place.stream, 0)
        self._streams.exchange(first, second)
        for place, data in zip(places, saved, strict=True):
            target = self._streams.places[owners[place]]
            try:
                slabs[target.slab].restore(target.stream, data)
            except VerifierError:  # `score` reports it when the sequence is needed
                slabs[target.slab].cut(target.stream, 0)
                self._streams.give_back(owners[place])

    def _exchange_whole(self, first: StreamPlace, second: StreamPlace) -> None:
        """Exchange two streams of a slab via its spare one."""
        if first.slab != second.slab:
            return
        slab, spare = self._streams.slabs[first.slab], self._streams.spare
        ways = [(first.stream, spare), (second.stream, first.stream), (spare, second.stream)]
        if first not in self._streams.places.values():
            ways = [(second.stream, first.stream)]
        for source, stream in ways:
            slab.copy(source, stream)
            slab.cut(source, 0)
        self._streams.exchange(first, second)

    def _lengths(self, slab: int) -> dict[int, int]:
        lengths = dict.fromkeys(range(self._sizes.shape.streams), 0)
        for sequence, place in self._streams.places.items():
            if place.slab == slab:
                lengths[place.stream] = self._table.computed(sequence)
        return lengths

    def _take_back(self, items: Sequence[Item]) -> None:
        for item in items:
            computed = self._table.computed(item.sequence)
            place = self._streams.places.get(item.sequence)
            if place is not None:
                self._streams.slabs[place.slab].cut(place.stream, computed)
            if not computed:
                self._streams.give_back(item.sequence)

    def _copy(self, source: StreamPlace, place: StreamPlace, length: int) -> None:
        slabs = self._streams.slabs
        if self._target.window:
            slabs[place.slab].copy(source.stream, place.stream)
        else:
            slabs[place.slab].restore(place.stream, slabs[source.slab].save(source.stream))
        slabs[place.slab].cut(place.stream, length)


def check(settings: EdgeSettings) -> None:
    """Check that the target is a GGUF, and that llama.cpp is installed; raises `VerifierError`."""
    if find_spec("llama_cpp") is None:
        raise VerifierError(
            "The engine llama.cpp needs the extra `edge-llama`; set engine to another one, or install it: "
            f"{install_command('edge-llama')}"
        )
    check_source(settings.target)
    if not is_gguf(Path(settings.target).expanduser()):
        raise UnsupportedModel(
            f"The engine llama.cpp takes a GGUF, and {settings.target} is none; name a .gguf file as target, or set "
            "engine to torch."
        )


def load(settings: EdgeSettings) -> Verifier:
    check(settings)
    require_trial(Path(settings.target).expanduser(), error=VerifierError)
    target = open_target(Path(settings.target), gpu_layers=settings.gpu_layers)
    if target.is_hybrid:
        hybrid = HybridVerifier(
            target, budget_bytes=settings.kv_bytes, context=settings.context, threads=settings.threads
        )
        run_trial(hybrid)
        return hybrid
    return LlamaCppVerifier(
        target,
        budget_bytes=settings.kv_bytes,
        context=settings.context,
        threads=settings.threads,
        batch_invariant=settings.batch_invariant,
    )
