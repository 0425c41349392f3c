"""Layout of a step: which tokens of which streams llama.cpp computes in one call.

llama.cpp keeps each sequence in a stream. It computes neighbouring streams together only if they have equally many new
tokens: streams 0, 2, 4 with a token each take three passes over the weights, and so do neighbours with 5, 3, 4 tokens.
A pass costs as much as some tokens. So a step is cut into rectangles of neighbouring streams by tokens of each, padded
where that is cheaper than another pass. Padding comes behind a stream's own tokens and is removed at once, so no row
depends on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Final

_ALONE: Final = 32
"""Tokens from which a stream is computed alone: kernels gain nothing from larger batches."""


@dataclass(frozen=True, slots=True)
class StreamPart:
    """One stream's new tokens in a step, with logits wanted at the last `rows` of them."""

    stream: int
    count: int
    rows: int


@dataclass(frozen=True, slots=True)
class Share:
    """One stream's part of a call: `count` new tokens from `first` on, and `filling` padding tokens.

    `count` is 0 for a stream that only fills a gap.
    """

    stream: int
    first: int
    count: int
    filling: int

    def wanted(self, tokens: int, rows: int) -> int:
        """Return how many of its tokens need logits, if the stream's step has `tokens` tokens and `rows` rows."""
        return max(0, min(self.count, self.first + self.count - (tokens - rows)))


Call = tuple[Share, ...]
"""Neighbouring streams with equally many tokens, `count + filling`, computed at once."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Limits of one call.

    Attributes:
        tokens: Most tokens; at least `least` for each stream.
        rows: Most rows of logits; at least the number of streams.
        least: Fewest tokens of one stream, padded if necessary, since llama.cpp may use another kernel for a single
            token.
    """

    tokens: int
    rows: int
    height: int
    least: int = 1


def lay_out(
    parts: Sequence[StreamPart], *, room: Mapping[int, int], call_tokens: float, limits: CallLimits
) -> list[Call]:
    """Return the calls of a step, in order.

    `room` has the free cells of all streams. A stream with a part MUST have room for `least` behind all of its tokens
    but the last. `call_tokens` is the cost of a pass over the weights, in tokens.
    """
    by_stream = {part.stream: part for part in sorted(parts, key=lambda part: part.stream)}
    together = {stream: part.count for stream, part in by_stream.items() if part.count < _ALONE}
    rectangles = _cheapest(together, room, call_tokens, limits.least) if together else []
    # These come last: until then their streams may fill gaps.
    rectangles += [[Share(stream, 0, part.count, 0)] for stream, part in by_stream.items() if part.count >= _ALONE]
    calls = (call for rectangle in rectangles for call in _cut(rectangle, by_stream, limits))
    return [_filled_up(call, limits.least) for call in calls]


def cost(calls: Sequence[Call], call_tokens: float) -> float:
    return sum(call_tokens + len(call) * (call[0].count + call[0].filling) for call in calls)


def _filled_up(call: Call, least: int) -> Call:
    missing = least - call[0].count - call[0].filling
    return tuple(replace(share, filling=share.filling + missing) for share in call) if missing > 0 else call


def _cheapest(counts: Mapping[int, int], room: Mapping[int, int], call_tokens: float, least: int) -> list[list[Share]]:
    """Return rectangles that cover all parts, in one layer or two: the second takes the rest of longer parts."""
    nothing = dict.fromkeys(room, 0)
    cost, best = _layer(counts, nothing, room, call_tokens, least)
    for height in sorted(set(counts.values()))[:-1]:
        lower = {stream: min(count, height) for stream, count in counts.items()}
        upper = {stream: count - height for stream, count in counts.items() if count > height}
        low_cost, low = _layer(lower, nothing, room, call_tokens, least)
        left = {stream: tokens - lower.get(stream, 0) for stream, tokens in room.items()}
        high_cost, high = _layer(upper, nothing | lower, left, call_tokens, least)
        if low_cost + high_cost < cost:
            cost, best = low_cost + high_cost, [*low, *high]
    return best


def _layer(
    counts: Mapping[int, int], first: Mapping[int, int], room: Mapping[int, int], call_tokens: float, least: int
) -> tuple[float, list[list[Share]]]:
    """Return the cheapest cut of a layer into adjacent rectangles, and its cost in tokens."""
    streams = sorted(counts)
    costs, cuts = [0.0], [0]
    for end in range(1, len(streams) + 1):
        best, cut = float("inf"), end - 1
        height, last = least, streams[end - 1]
        min_room, seen = room[last], last
        for begin in range(end - 1, -1, -1):
            stream = streams[begin]
            height = max(height, counts[stream])
            # Every stream of the rectangle needs room for its height, also those in gaps.
            for number in range(stream, seen):
                min_room = min(min_room, room[number])
            seen = stream
            if min_room < height and begin < end - 1:
                break
            cost = costs[begin] + call_tokens + (last - stream + 1) * height
            if cost < best:
                best, cut = cost, begin
        costs.append(best)
        cuts.append(cut)
    rectangles, end = [], len(streams)
    while end:
        begin = cuts[end]
        members = streams[begin:end]
        height = max(least, *(counts[stream] for stream in members))
        rectangles.append(
            [
                Share(stream, first[stream], counts.get(stream, 0), height - counts.get(stream, 0))
                for stream in range(members[0], members[-1] + 1)
            ]
        )
        end = begin
    return costs[-1], rectangles[::-1]


def _cut(rectangle: Sequence[Share], parts: Mapping[int, StreamPart], limits: CallLimits) -> list[Call]:
    """Cut a rectangle to the limits: between streams, or across if one alone exceeds them.

    Cut across, many streams with a few tokens would become calls with one token of each, padded by `least`.
    """
    height = rectangle[0].count + rectangle[0].filling
    rows = [sum(_has_row(share, parts.get(share.stream), at) for at in range(height)) for share in rectangle]
    if height <= min(limits.height, limits.tokens) and max(rows) <= limits.rows:
        return _cut_between(rectangle, rows, height, limits)
    return _cut_across(rectangle, parts, height, limits)


def _cut_between(rectangle: Sequence[Share], rows: Sequence[int], height: int, limits: CallLimits) -> list[Call]:
    calls = max(ceil(sum(rows) / limits.rows), ceil(len(rectangle) * height / limits.tokens))
    most = min(ceil(len(rectangle) / calls), limits.tokens // height)
    pieces: list[list[Share]] = [[]]
    taken = 0
    for share, wanted in zip(rectangle, rows, strict=True):
        if len(pieces[-1]) == most or taken + wanted > limits.rows:
            pieces.append([])
            taken = 0
        pieces[-1].append(share)
        taken += wanted
    return [tuple(piece) for piece in pieces if any(share.count for share in piece)]


def _cut_across(
    rectangle: Sequence[Share], parts: Mapping[int, StreamPart], height: int, limits: CallLimits
) -> list[Call]:
    calls, begin = [], 0
    while begin < height:
        end, rows = begin, 0
        most = min(limits.height, limits.tokens // len(rectangle))
        while end < min(height, begin + most):
            rows += sum(_has_row(share, parts.get(share.stream), end) for share in rectangle)
            if rows > limits.rows:
                break
            end += 1
        calls.append(tuple(_slice(share, begin, end) for share in rectangle))
        begin = end
    return calls


def _has_row(share: Share, part: StreamPart | None, offset: int) -> bool:
    return part is not None and offset < share.count and share.first + offset >= part.count - part.rows


def _slice(share: Share, begin: int, end: int) -> Share:
    count = min(max(share.count - begin, 0), end - begin)
    return Share(share.stream, share.first + min(begin, share.count), count, end - begin - count)
