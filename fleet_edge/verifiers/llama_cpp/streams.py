"""Streams of all slabs: which sequence is where within a budget of memory, and when to move one.

All streams have one length, so that a sequence fits into any. A slab is made when its first stream is needed, and kept.

llama.cpp computes neighbouring streams in one pass over the weights (see `layout`). Idle and retained sequences lie
between the running ones, so the longer an edge runs, the more passes a step takes. Moving a sequence costs less than a
pass. Each step adds its loss to a debt, and sequences are moved once the debt exceeds the price of moving. The total is
at most twice that of the best moves.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fleet_edge.verifiers.llama_cpp.slab import BATCH, CELL_ROUNDING, LlamaSlab, SlabShape

_PATIENCE: Final = 2
"""A sequence counts as active for this multiple of the longest pause between two of its steps."""

_SHORTEST_PAUSE: Final = 2
_FIRST_PAUSE: Final = 4
_LONGEST_PAUSE: Final = 64
"""Pauses in steps: a device that is silent for longer may not come back."""

_COPIED_TOKENS: Final = 1.0 / 64
"""Price of copying a token's keys and values, in tokens computed in a batch. On one core with a model of 135 million
weights, copying takes 0.014 ms and computing 5.6 ms."""

_COPY_OVERHEAD: Final = 64
"""Fixed price of a copy, in copied tokens."""


@dataclass(slots=True)
class _Use:
    step: int
    pause: int = _FIRST_PAUSE


@dataclass(slots=True)
class ActiveSequences:
    """Sequences that are likely in one of the next steps, judged by the latest ones."""

    _step: int = 0
    _uses: dict[int, _Use] = field(default_factory=dict)

    def step(self, sequences: Iterable[int]) -> None:
        self._step += 1
        for sequence in sequences:
            use = self._uses.setdefault(sequence, _Use(self._step))
            use.pause = min(_LONGEST_PAUSE, max(self._step - use.step, use.pause * 3 // 4, _SHORTEST_PAUSE))
            use.step = self._step

    def began(self, sequence: int) -> None:
        self._uses[sequence] = _Use(self._step)

    def forget(self, sequence: int) -> None:
        self._uses.pop(sequence, None)

    def __contains__(self, sequence: int) -> bool:
        use = self._uses.get(sequence)
        return use is not None and self._step - use.step <= _PATIENCE * use.pause


def nearest(free: Iterable[int], active: Sequence[int]) -> int:
    """Return the free stream nearest to the active ones; of several the lowest."""
    return min(free, key=lambda stream: (min((abs(stream - each) for each in active), default=0), stream))


@dataclass(frozen=True, slots=True)
class Moves:
    """Pairs of streams whose sequences, the first possibly none, change places; the price in tokens."""

    pairs: tuple[tuple[int, int], ...]
    price: float


def cheapest_moves(active: Sequence[int], *, lengths: Mapping[int, int], begins: Iterable[int]) -> Moves | None:
    """Return the cheapest moves that make the active sequences neighbours; None if there is no place for all.

    `active` are ascending streams, `lengths` their tokens, and `begins` the first streams of possible places.
    """
    best: Moves | None = None
    for begin in begins:
        place = range(begin, begin + len(active))
        holes = sorted(set(place).difference(active))
        outside = [stream for stream in active if stream not in place]
        copied = [lengths[stream] for stream in (*holes, *outside) if stream in lengths]
        price = _COPIED_TOKENS * (sum(copied) + _COPY_OVERHEAD * len(copied))
        if best is None or price < best.price:
            best = Moves(tuple(zip(holes, outside, strict=True)), price)
    return best


_SLAB_STREAMS: Final = 64
"""Most streams of a slab: it takes memory for all at once, but each slab of a step is a pass over the weights."""

_STREAMS_WANTED: Final = 16
_LENGTH_WANTED: Final = 4096
"""If the budget does not hold this many sequences of the whole context, they may have at least this many tokens."""

_MAX_ROWS: Final = 320
"""Rows of a call: 64 sequences with drafts of 4. A step with more takes another pass over the weights."""

_ROW_BYTES: Final = 64 << 20
"""Memory for logits of a call of all slabs, outside the budget; a step of several calls takes as much again."""

_SCORE_BYTES: Final = 64 << 20
"""Memory for attention scores of all slabs (tokens of a call by cells), outside the budget too."""

_FEWEST_TOKENS: Final = 64
"""Tokens of a call where that memory is short."""

_FLOAT32: Final = 4


@dataclass(frozen=True, slots=True)
class StreamSizes:
    """Use of a budget: most tokens of a sequence, most slabs, and their shape."""

    context: int
    slabs: int
    shape: SlabShape

    @property
    def streams(self) -> int:
        return self.slabs * self.shape.streams


def size_streams(
    *, budget_bytes: int, token_bytes: int, trained: int, wanted: int, width: int, heads: int, threads: int
) -> StreamSizes | None:
    """Return how to use a budget of KV memory; None if it does not hold a single stream.

    `trained` is the model's context, `wanted` the one asked for; 0 for as much as leaves room for several sequences.
    `width` is the row length of the logits, `heads` the query heads of a layer that stores attention scores.
    """
    tokens = budget_bytes // token_bytes
    if tokens < CELL_ROUNDING:
        return None
    # One cell more than the context, so that the last token may be padded too.
    if wanted:
        cells = _rounded_up(min(trained, wanted) + 1)
    else:
        # Rounded down, so that as many as wanted fit in.
        cells = max(tokens // _STREAMS_WANTED, min(_LENGTH_WANTED, tokens // 2), CELL_ROUNDING)
        cells = min(cells // CELL_ROUNDING * CELL_ROUNDING, _rounded_up(trained + 1))
    cells = min(cells, tokens // CELL_ROUNDING * CELL_ROUNDING)
    context = min(trained, wanted or trained, cells - 1)
    streams = tokens // cells
    scores = cells * heads * _FLOAT32  # of a token
    # A call has at least two tokens of each stream.
    most = min(_SLAB_STREAMS, max(_FEWEST_TOKENS, _SCORE_BYTES // scores) // 2) if scores else _SLAB_STREAMS
    slabs = -(-streams // most)
    each = streams // slabs
    rows = max(each, min(_MAX_ROWS, _ROW_BYTES // (_FLOAT32 * width * slabs)))
    tokens = max(_FEWEST_TOKENS, 2 * each, _SCORE_BYTES // (scores * slabs)) if scores else BATCH
    tokens = min(BATCH, each * cells, tokens)
    return StreamSizes(context, slabs, SlabShape(each, cells, rows, tokens, threads))


def _rounded_up(cells: int) -> int:
    return -(-cells // CELL_ROUNDING) * CELL_ROUNDING


@dataclass(frozen=True, slots=True)
class StreamPlace:
    slab: int
    stream: int


class StreamTable:
    """Places of sequences. Streams are also numbered through all slabs."""

    def __init__(self, sizes: StreamSizes, make: Callable[[], LlamaSlab], *, spare: bool = False) -> None:
        """Begin with the first slab; with `spare`, the last stream of each slab stays free for exchanges."""
        self._sizes = sizes
        self._make = make
        self.slabs = [make()]
        self._places: dict[int, StreamPlace] = {}
        self.spare = sizes.shape.streams - 1
        self._spare = spare and self.spare > 0
        self._free: list[set[int]] = [set(range(sizes.shape.streams - self._spare)) for _ in range(sizes.slabs)]

    @property
    def free(self) -> int:
        return sum(map(len, self._free))

    @property
    def places(self) -> Mapping[int, StreamPlace]:
        """Places of the sequences that have computed tokens."""
        return self._places

    def assign(self, sequence: int, *, active: Sequence[int] = (), slab: int | None = None) -> StreamPlace:
        """Give a sequence without a stream a free one near the `active` streams; `slab` or any MUST have one.

        Raises `CapacityExceeded` if the machine has no memory for another slab.
        """
        made = range(len(self.slabs)) if slab is None else (slab,)
        free = [self.number(StreamPlace(each, stream)) for each in made for stream in self._free[each]]
        if not free:
            self.slabs.append(self._make())
            free = [self.number(StreamPlace(len(self.slabs) - 1, 0))]
        place = self.place(nearest(free, active))
        self._free[place.slab].remove(place.stream)
        self._places[sequence] = place
        return place

    def number(self, place: StreamPlace) -> int:
        return place.slab * self._sizes.shape.streams + place.stream

    def place(self, number: int) -> StreamPlace:
        return StreamPlace(*divmod(number, self._sizes.shape.streams))

    def begins(self, count: int) -> Iterator[int]:
        """Yield the first of each `count` neighbours, in as few slabs as possible: a pass covers only one slab."""
        each = self._sizes.shape.streams
        fewest = -(-count // each)
        for begin in range(each * len(self.slabs) - count + 1):
            last = begin + count - 1
            within = last // each - begin // each < fewest
            if within and not (self._spare and begin // each * each + self.spare <= last):
                yield begin

    def exchange(self, first: StreamPlace, second: StreamPlace) -> None:
        """Record that the sequences of two streams, one possibly empty, have changed places."""
        owners = {place: sequence for sequence, place in self._places.items()}
        for place, other in ((first, second), (second, first)):
            owner = owners.get(other)
            if owner is None:
                self._free[place.slab].add(place.stream)
            else:
                self._free[place.slab].discard(place.stream)
                self._places[owner] = place

    def has_free(self, slab: int) -> bool:
        return bool(self._free[slab])

    def give_back(self, sequence: int) -> StreamPlace | None:
        place = self._places.pop(sequence, None)
        if place is not None:
            self._free[place.slab].add(place.stream)
        return place
