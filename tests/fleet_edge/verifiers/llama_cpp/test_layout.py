import itertools
import random
from collections.abc import Sequence

import pytest

from fleet_edge.verifiers.llama_cpp.context import CallLimits, StreamSpan, fill, pad

PASS_TOKENS = 8.0
LIMITS = CallLimits(tokens=64, rows=40)
STREAMS = 16


def parts_of(counts: dict[int, int], rows: dict[int, int] | None = None) -> list[StreamSpan]:
    parts, row = list[StreamSpan](), 0
    for stream, count in counts.items():
        wanted = (rows or {}).get(stream, count)
        parts.append(StreamSpan(stream, list(range(1, count + 1)), wanted, row))
        row += wanted
    return parts


def padded(
    counts: dict[int, int], *, room: Sequence[int] = (1000,) * STREAMS, min_tokens: int = 1
) -> list[list[StreamSpan]]:
    return pad(parts_of(counts), room=room, pass_tokens=PASS_TOKENS, limits=LIMITS, min_tokens=min_tokens)


def streams(calls: list[list[StreamSpan]]) -> set[tuple[int, ...]]:
    return {tuple(part.stream for part in call) for call in calls}


def price(calls: list[list[StreamSpan]]) -> float:
    return sum(PASS_TOKENS + sum(len(part.tokens) + part.padding for part in call) for call in calls)


def runs(ordered: Sequence[int], cuts: Sequence[bool]) -> list[list[int]]:
    found = [[ordered[0]]]
    for stream, cut in zip(ordered[1:], cuts, strict=True):
        if cut:
            found.append([])
        found[-1].append(stream)
    return found


@pytest.mark.parametrize("min_tokens", [1, 2])
@pytest.mark.parametrize("seed", range(60))
def test_calls_have_each_token_and_row_once_within_the_limits(seed: int, min_tokens: int) -> None:
    rng = random.Random(seed)
    counts = {
        stream: rng.choice((1, 1, 2, 5, 9, 31, 32, 70)) for stream in rng.sample(range(STREAMS), rng.randrange(1, 9))
    }
    parts = parts_of(counts, {stream: rng.randrange(count + 1) for stream, count in counts.items()})
    room = [counts.get(stream, 0) + rng.choice((1, 1, 3, 50)) for stream in range(STREAMS)]
    calls = pad(parts, room=room, pass_tokens=PASS_TOKENS, limits=LIMITS, min_tokens=min_tokens)
    filled = fill(parts, LIMITS)
    for part in parts:
        for each in (calls, filled):
            pieces = [piece for call in each for piece in call if piece.stream == part.stream and piece.tokens]
            assert list(itertools.chain(*(piece.tokens for piece in pieces))) == part.tokens
            rows = [piece.row + at for piece in pieces for at in range(piece.rows)]
            assert rows == list(range(part.row, part.row + part.rows))
            assert all(piece.rows <= len(piece.tokens) for piece in pieces)
            assert all(piece.rows == len(piece.tokens) for piece in pieces[1:] if pieces[0].rows)
    left = list(room)
    for call in calls:
        heights = {len(part.tokens) + part.padding for part in call}
        assert len(heights) == 1
        assert min(heights) >= min_tokens
        assert [part.stream for part in call] == list(range(call[0].stream, call[0].stream + len(call)))
        assert len(call) * min(heights) <= LIMITS.tokens
        assert sum(part.rows for part in call) <= LIMITS.rows
        for part in call:
            assert len(part.tokens) + part.padding <= left[part.stream]
            left[part.stream] -= len(part.tokens)
    for call in filled:
        assert sum(len(part.tokens) for part in call) <= LIMITS.tokens
        assert sum(part.rows for part in call) <= LIMITS.rows
        assert not any(part.padding for part in call)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_is_cheaper(seed: int) -> None:
    rng = random.Random(seed)
    counts = {stream: rng.choice((1, 2, 5, 9)) for stream in sorted(rng.sample(range(10), 5))}
    everywhere = [
        sum(
            PASS_TOKENS + (run[-1] - run[0] + 1) * max(counts[stream] for stream in run)
            for run in runs(sorted(counts), cuts)
        )
        for cuts in itertools.product((False, True), repeat=len(counts) - 1)
    ]
    assert price(padded(counts)) == min(everywhere)


def test_a_small_gap_is_filled_and_a_large_one_takes_another_pass() -> None:
    assert streams(padded({0: 1, 2: 1})) == {(0, 1, 2)}
    assert streams(padded({0: 1, 15: 1})) == {(0,), (15,)}


def test_a_stream_without_room_is_not_padded() -> None:
    room = [1000, 1, 1000, *[1000] * 13]
    assert streams(padded({0: 5, 1: 1, 2: 5}, room=room)) == {(0,), (1,), (2,)}
