import random

import pytest

from fleet_edge.verifiers.llama_cpp.layout import Call, CallLimits, Share, StreamPart, lay_out

LIMITS = CallLimits(tokens=512, rows=128, height=63)
ROOM = dict.fromkeys(range(16), 200)


def cost(calls: list[Call], call_tokens: float) -> float:
    return sum(call_tokens + sum(share.count + share.filling for share in call) for call in calls)


def test_every_token_is_computed_once_in_order_and_what_fills_up_has_room() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        streams = rng.randrange(1, 17)
        cells = rng.choice((20, 200))
        # As in the verifier, a sequence leaves one of a stream's cells free.
        lengths = {stream: rng.choice((0, 0, 3, cells - rng.randrange(2, 20), cells - 1)) for stream in range(streams)}
        room = {stream: cells - length for stream, length in lengths.items()}
        parts = []
        for stream in rng.sample(range(streams), rng.randrange(1, streams + 1)):
            if room[stream] < 2:
                continue
            count = rng.randrange(1, min(room[stream] - 1, rng.choice((2, 7, 200))) + 1)
            parts.append(StreamPart(stream, count, rng.randrange(count + 1)))
        limits = CallLimits(
            tokens=rng.choice((2 * streams, 512)),
            rows=rng.choice((streams, 128)),
            height=rng.choice((4, 63, 512)),
            least=rng.choice((1, 2)),
        )
        calls = lay_out(parts, room=room, call_tokens=rng.choice((1.0, 5.0, 64.0)), limits=limits)
        done = dict.fromkeys(lengths, 0)
        wanted = {part.stream: part for part in parts}
        rows = dict.fromkeys(wanted, 0)
        for call in calls:
            assert [share.stream for share in call] == list(range(call[0].stream, call[0].stream + len(call)))
            heights = {share.count + share.filling for share in call}
            assert len(heights) == 1
            assert 0 < sum(share.count + share.filling for share in call) <= limits.tokens
            assert limits.least <= heights.pop() <= limits.height
            in_call = 0
            for share in call:
                # Tokens follow those of the stream; padding is gone when the next call begins.
                assert share.first == done[share.stream]
                assert share.first + share.count + share.filling <= room[share.stream]
                done[share.stream] += share.count
                part = wanted.get(share.stream, StreamPart(share.stream, 0, 0))
                in_call += share.wanted(part.count, part.rows)
                if part.count:
                    rows[share.stream] += share.wanted(part.count, part.rows)
            assert in_call <= limits.rows
        assert {stream: count for stream, count in done.items() if count} == {part.stream: part.count for part in parts}
        assert rows == {part.stream: part.rows for part in parts}


def test_no_step_costs_more_than_each_sequence_alone_or_all_filled_up() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        parts = [StreamPart(stream, rng.randrange(1, 10), 1) for stream in rng.sample(range(16), rng.randrange(1, 17))]
        call_tokens = rng.choice((1.0, 3.0, 10.0, 64.0))
        calls = lay_out(parts, room=ROOM, call_tokens=call_tokens, limits=LIMITS)
        alone = sum(call_tokens + part.count for part in parts)
        numbers = [part.stream for part in parts]
        whole = call_tokens + (max(numbers) - min(numbers) + 1) * max(part.count for part in parts)
        assert cost(calls, call_tokens) <= min(alone, whole)


def test_a_gap_is_filled_where_that_is_cheaper_than_another_pass() -> None:
    parts = [StreamPart(0, 1, 1), StreamPart(2, 1, 1)]
    filled = lay_out(parts, room=ROOM, call_tokens=3.0, limits=LIMITS)
    assert filled == [(Share(0, 0, 1, 0), Share(1, 0, 0, 1), Share(2, 0, 1, 0))]
    assert len(lay_out(parts, room=ROOM, call_tokens=0.5, limits=LIMITS)) == 2
    assert len(lay_out(parts, room=ROOM | {1: 0}, call_tokens=3.0, limits=LIMITS)) == 2


def test_a_prompt_is_not_mixed_with_drafts() -> None:
    calls = lay_out(
        [StreamPart(0, 5, 5), StreamPart(1, 100, 0), StreamPart(2, 5, 5)], room=ROOM, call_tokens=3.0, limits=LIMITS
    )
    assert sorted(share.count for call in calls for share in call if share.stream == 1 and share.count) == [37, 63]
    assert all(share.count in {0, 5, 37, 63} for call in calls for share in call)


@pytest.mark.parametrize("least", [1, 2])
def test_a_single_token_gets_company_where_it_would_be_computed_in_another_way(least: int) -> None:
    limits = CallLimits(tokens=512, rows=128, height=512, least=least)
    calls = lay_out([StreamPart(3, 1, 1)], room=ROOM, call_tokens=3.0, limits=limits)
    assert calls == [(Share(3, 0, 1, least - 1),)]
    together = lay_out([StreamPart(stream, 1, 1) for stream in range(16)], room=ROOM, call_tokens=3.0, limits=limits)
    assert together == [tuple(Share(stream, 0, 1, least - 1) for stream in range(16))]
    # The last of a long part, and what rows cut off, are such tokens too.
    calls = lay_out([StreamPart(3, 513, 1)], room={3: 514}, call_tokens=3.0, limits=limits)
    assert calls == [(Share(3, 0, 512, 0),), (Share(3, 512, 1, least - 1),)]
    few = CallLimits(tokens=512, rows=2, height=512, least=least)
    calls = lay_out([StreamPart(3, 3, 3)], room=ROOM, call_tokens=3.0, limits=few)
    assert calls == [(Share(3, 0, 2, 0),), (Share(3, 2, 1, least - 1),)]


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize(("streams", "tokens", "fewest"), [(31, 2, 2), (31, 3, 2), (48, 2, 2), (60, 5, 5)])
def test_many_drafts_are_cut_between_streams(streams: int, tokens: int, fewest: int, least: int) -> None:
    """Otherwise each call would hold a token of each, and take twice the time of a bit-identical one."""
    limits = CallLimits(tokens=512, rows=60, height=512, least=least)
    parts = [StreamPart(stream, tokens, tokens) for stream in range(streams)]
    calls = lay_out(parts, room=dict.fromkeys(range(streams), 200), call_tokens=3.0, limits=limits)
    assert len(calls) == fewest
    assert {(share.count, share.filling) for call in calls for share in call} == {(tokens, 0)}
