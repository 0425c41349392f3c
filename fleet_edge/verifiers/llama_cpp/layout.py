"""Layout of a step: which tokens llama.cpp computes in one call.

llama.cpp keeps each sequence in a stream, and computes streams together only if they are neighbours with equally many
new tokens: otherwise it passes over the weights several times. A pass costs as much as some tokens. So the streams of a
step are cut into calls, and those of a call are padded to equally many tokens. Padding comes behind a stream's own
tokens and is removed at once, so no row depends on it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

_ALONE: Final = 32
"""Tokens from which a stream is computed alone: kernels gain nothing from larger batches."""


@dataclass(frozen=True, slots=True)
class StreamSpan:
    """One stream's tokens of a step or a call.

    Attributes:
        rows: Logits wanted at the last `rows` of `tokens`.
        row: Place of the first of them in the step's logits.
        padding: Tokens to compute behind `tokens`.
    """

    stream: int
    tokens: Sequence[int]
    rows: int
    row: int = 0
    padding: int = 0


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Max tokens of a call, and max rows of logits."""

    tokens: int
    rows: int


def pad(
    parts: Sequence[StreamSpan], *, room: Sequence[int], pass_tokens: float, limits: CallLimits, min_tokens: int = 1
) -> list[list[StreamSpan]]:
    """Return the cheapest calls of neighbouring streams, which are padded to equally many tokens.

    `room` has the free cells of all streams: `min_tokens` at least behind all tokens of a part but the last.
    `pass_tokens` is the cost of a pass over the weights, in tokens.
    """
    few = sorted((part for part in parts if len(part.tokens) < _ALONE), key=lambda part: part.stream)
    costs, begins = [0.0], [0]  # of the first streams: the cost of their calls, and where the last of these begins
    for end in range(1, len(few) + 1):
        last, height, rows, best = few[end - 1].stream, min_tokens, 0, (float("inf"), 0)
        for begin in range(end - 1, -1, -1):
            part = few[begin]
            height, rows = max(height, len(part.tokens)), rows + part.rows
            size = (last - part.stream + 1) * height
            fits = size <= limits.tokens and rows <= limits.rows and min(room[part.stream : last + 1]) >= height
            if begin < end - 1 and not fits:
                break
            best = min(best, (costs[begin] + pass_tokens + size, begin))
        costs.append(best[0])
        begins.append(best[1])
    calls, end = list[list[StreamSpan]](), len(few)
    while end:
        calls.append(_padded(few[begins[end] : end], min_tokens))
        end = begins[end]
    # These come last: until then their streams have room for padding.
    alone = [piece for part in parts if len(part.tokens) >= _ALONE for piece in _pieces(part, limits)]
    return calls + [_padded([piece], min_tokens) for piece in alone]


def fill(parts: Sequence[StreamSpan], limits: CallLimits) -> list[list[StreamSpan]]:
    """Return calls with as many whole parts as fit, without padding."""
    calls = list[list[StreamSpan]]()
    tokens = rows = 0
    for piece in (piece for part in parts for piece in _pieces(part, limits)):
        tokens, rows = tokens + len(piece.tokens), rows + piece.rows
        if not calls or tokens > limits.tokens or rows > limits.rows:
            calls.append([])
            tokens, rows = len(piece.tokens), piece.rows
        calls[-1].append(piece)
    return calls


def _padded(parts: Sequence[StreamSpan], min_tokens: int) -> list[StreamSpan]:
    """Pad neighbours to equally many tokens; the streams between them get padding alone."""
    height = max(min_tokens, *(len(part.tokens) for part in parts))
    by_stream = {part.stream: part for part in parts}
    call = [by_stream.get(stream, StreamSpan(stream, (), 0)) for stream in range(parts[0].stream, parts[-1].stream + 1)]
    return [replace(part, padding=height - len(part.tokens)) for part in call]


def _pieces(part: StreamSpan, limits: CallLimits) -> Iterator[StreamSpan]:
    """Cut a part to the limits of a call."""
    begin, row, first = 0, part.row, len(part.tokens) - part.rows
    while begin < len(part.tokens):
        end = min(len(part.tokens), begin + limits.tokens, max(begin, first) + limits.rows)
        rows = max(0, end - max(begin, first))
        yield StreamSpan(part.stream, part.tokens[begin:end], rows, row)
        begin, row = end, row + rows
