"""Streams of all slabs: which sequence is where, within a budget of memory.

All streams are of one length, so that a sequence fits into any, and all slabs of one shape. A slab is made when its
first stream is needed and then kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fleet_edge.verifiers.llama_cpp.placement import nearest
from fleet_edge.verifiers.llama_cpp.slab import BATCH, CELL_ROUNDING, Slab, SlabShape

_SLAB_STREAMS: Final = 64
"""Most streams of a slab, which takes memory for all at once: each slab of a step is a pass over the weights."""

_STREAMS_WANTED: Final = 16
_LENGTH_WANTED: Final = 4096
"""Tokens: where the budget does not hold so many texts of the whole context, texts may have so many tokens at least."""

_MOST_ROWS: Final = 320
"""Of a call: those of 64 texts with drafts of 4. A step with more takes another pass over the weights."""

_ROW_BYTES: Final = 64 << 20
"""Memory for logits of a call of all slabs together, which is not in the budget; a step of several calls takes as much
again, to collect them."""

_SCORE_BYTES: Final = 64 << 20
"""Memory for attention scores of all slabs together, each token of a call against every cell, which is not in the
budget either."""

_FEWEST_TOKENS: Final = 64
"""Of a call, where that memory is short."""

_FLOAT32: Final = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """How a budget is used.

    Attributes:
        context: Most tokens of a sequence.
        slabs: Most slabs.
        shape: Of each.
    """

    context: int
    slabs: int
    shape: SlabShape

    @property
    def streams(self) -> int:
        """Most sequences that have computed tokens at a time."""
        return self.slabs * self.shape.streams


def plan_streams(
    *, budget_bytes: int, token_bytes: int, trained: int, wanted: int, width: int, heads: int, threads: int
) -> Plan | None:
    """Return how to use a budget; None if it does not hold a single stream.

    Args:
        budget_bytes: Most memory for keys and values.
        token_bytes: Of keys and values of a token.
        trained: Tokens of context that the model has.
        wanted: Tokens of context that are asked for; 0 for as many as leave room for several texts.
        width: Rows of logits of the model.
        heads: Of queries of a layer, for which scores take memory; 0 where none are kept.
        threads: Of a call.
    """
    tokens = budget_bytes // token_bytes
    if tokens < CELL_ROUNDING:
        return None
    # One cell more than the context, so that the last token too can have one beside it that nobody asked for.
    if wanted:
        cells = _rounded_up(min(trained, wanted) + 1)
    else:
        # Rounded down: rounded up, as many as are wanted would not fit in.
        cells = max(tokens // _STREAMS_WANTED, min(_LENGTH_WANTED, tokens // 2), CELL_ROUNDING)
        cells = min(cells // CELL_ROUNDING * CELL_ROUNDING, _rounded_up(trained + 1))
    cells = min(cells, tokens // CELL_ROUNDING * CELL_ROUNDING)
    context = min(trained, wanted or trained, cells - 1)
    streams = tokens // cells
    scores = cells * heads * _FLOAT32  # of a token
    # A call has two tokens of each stream, at least.
    most = min(_SLAB_STREAMS, max(_FEWEST_TOKENS, _SCORE_BYTES // scores) // 2) if scores else _SLAB_STREAMS
    slabs = -(-streams // most)
    each = streams // slabs
    rows = max(each, min(_MOST_ROWS, _ROW_BYTES // (_FLOAT32 * width * slabs)))
    tokens = max(_FEWEST_TOKENS, 2 * each, _SCORE_BYTES // (scores * slabs)) if scores else BATCH
    tokens = min(BATCH, each * cells, tokens)
    return Plan(context, slabs, SlabShape(each, cells, rows, tokens, threads))


def _rounded_up(cells: int) -> int:
    return -(-cells // CELL_ROUNDING) * CELL_ROUNDING


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sequence is.

    Attributes:
        slab: Number of its slab.
        stream: Number within it.
    """

    slab: int
    stream: int


class StreamTable:
    """Places of sequences. Streams are also numbered through all slabs."""

    def __init__(self, plan: Plan, make: Callable[[], Slab], *, spare: bool = False) -> None:
        """Begin with the first slab.

        Args:
            plan: How the budget is used.
            make: Makes a slab.
            spare: Whether the last stream of each slab is kept free, to exchange two others by way of it.
        """
        self._plan = plan
        self._make = make
        self.slabs = [make()]
        self._places: dict[int, Place] = {}
        self.spare = plan.shape.streams - 1
        self._spare = spare and self.spare > 0
        self._free: list[set[int]] = [set(range(plan.shape.streams - self._spare)) for _ in range(plan.slabs)]

    @property
    def free(self) -> int:
        return sum(map(len, self._free))

    @property
    def places(self) -> Mapping[int, Place]:
        """By sequence that has computed tokens."""
        return self._places

    def take(self, sequence: int, *, active: Sequence[int] = (), slab: int | None = None) -> Place:
        """Give a sequence a free stream, of which there MUST be one.

        Args:
            sequence: It MUST have none.
            active: Numbers of streams that the sequence is going to be computed with: one near them is taken.
            slab: Only one of this slab will do.

        Raises:
            CapacityExceeded: The machine has no memory for another slab.
        """
        made = range(len(self.slabs)) if slab is None else (slab,)
        free = [self.number(Place(each, stream)) for each in made for stream in self._free[each]]
        if not free:
            self.slabs.append(self._make())
            free = [self.number(Place(len(self.slabs) - 1, 0))]
        place = self.place(nearest(free, active))
        self._free[place.slab].remove(place.stream)
        self._places[sequence] = place
        return place

    def number(self, place: Place) -> int:
        """Return a stream's number among those of all slabs."""
        return place.slab * self._plan.shape.streams + place.stream

    def place(self, number: int) -> Place:
        """Return the place of a stream with a number."""
        return Place(*divmod(number, self._plan.shape.streams))

    def begins(self, count: int) -> Iterator[int]:
        """Yield the first of each `count` neighbours, in as few slabs as can be: those of two are never one pass."""
        each = self._plan.shape.streams
        fewest = -(-count // each)
        for begin in range(each * len(self.slabs) - count + 1):
            last = begin + count - 1
            within = last // each - begin // each < fewest
            if within and not (self._spare and begin // each * each + self.spare <= last):
                yield begin

    def exchange(self, first: Place, second: Place) -> None:
        """Note that the sequences of two streams, of which one may have none, have changed places."""
        owners = {place: sequence for sequence, place in self._places.items()}
        for place, other in ((first, second), (second, first)):
            owner = owners.get(other)
            if owner is None:
                self._free[place.slab].add(place.stream)
            else:
                self._free[place.slab].discard(place.stream)
                self._places[owner] = place

    def has_free(self, slab: int) -> bool:
        """Return whether a slab has a free stream."""
        return bool(self._free[slab])

    def give_back(self, sequence: int) -> Place | None:
        """Free a sequence's stream; return it, or None if it had none."""
        place = self._places.pop(sequence, None)
        if place is not None:
            self._free[place.slab].add(place.stream)
        return place
