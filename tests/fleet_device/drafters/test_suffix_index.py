import random

import numpy as np

from fleet_device.drafters.suffix_index import (
    LENGTHS,
    LONGEST,
    TOKEN_BYTES,
    History,
    SuffixIndex,
)


def search(tokens: list[int], end: list[int]) -> list[int]:
    """Return the tokens after each match of the longest indexed length, the latest first."""
    for size in reversed(LENGTHS):
        places = [p for p in range(size, len(tokens)) if len(end) >= size and tokens[p - size : p] == end[-size:]]
        if followers := [tokens[place] for place in reversed(places) if tokens[place] >= 0]:
            return followers
    return []


def test_whatever_was_appended_and_taken_back_it_finds_what_a_plain_search_finds() -> None:
    rng, index, tokens, found = random.Random(3), SuffixIndex(), list[int](), 0
    for _ in range(1500):
        if rng.random() < 0.6:
            new = [rng.randrange(3) if rng.random() < 0.98 else -1 for _ in range(rng.choice((1, 1, 1, 5, 30)))]
            tokens += new
            index.append(new)
        else:
            length = rng.randrange(max(0, len(tokens) - 40), len(tokens) + 1)
            del tokens[length:]
            index.truncate(length)
        if len(tokens) > 500:
            del tokens[40:]
            index.truncate(40)
        end = tokens[-LONGEST:]
        if min(end, default=-1) < 0:
            continue
        match, expected = index.find(end), search(tokens, end)
        followers = [] if match is None else match.followers
        assert followers == expected[: len(followers)]
        assert (match is None) == (not expected)
        found += match is not None
    assert found > 500


def test_nothing_is_found_across_two_texts() -> None:
    index = SuffixIndex()
    index.append([1, 2, -1, 3, 4, 5])
    assert index.find([1, 2]) is None
    assert index.find([2, 3]) is None
    assert index.find([3, 4]) is not None


def test_a_text_of_one_token_is_searched_in_bounded_steps() -> None:
    index = SuffixIndex()
    index.append(np.full(20_000, 5))
    match = index.find([5] * LONGEST)
    assert len(match.followers) <= 16


TEXT = list(range(100, 140))


def test_of_a_prompt_only_its_end_is_kept() -> None:
    history = History()
    history.remember(list(range(500, 600)), TEXT)
    assert history.tokens == 8 + len(TEXT) + 1
    assert history.find([500, 501]) is None
    match = history.find([598, 599, 100, 101])
    assert match is not None
    assert match.followers == [102]


def test_memory_is_bounded_and_the_latest_generations_are_kept() -> None:
    rng = random.Random(2)
    history = History(memory_bytes=300 * TOKEN_BYTES)
    for _ in range(200):
        text = [rng.randrange(1000) for _ in range(30)]
        history.remember([], text)
        assert history.tokens <= 300
        match = history.find(text[:10])
        assert match is not None
        assert match.followers[0] == text[10]


def test_a_generation_longer_than_all_there_is_room_for_is_kept_as_far_as_there_is_room() -> None:
    history = History(memory_bytes=100 * TOKEN_BYTES)
    history.remember([], [number % 1000 for number in range(5000)])
    assert history.tokens <= 100
