from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_edge.sessions.ngrams import MAX_SPECULATED, NgramSpeculation


class Counted(Sequence[int]):
    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.looks = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        self.looks += 1
        return self.tokens[place]


def test_what_followed_the_same_tokens_is_guessed() -> None:
    assert NgramSpeculation().next([7, 8, 9, 10, 11, 1, 2, 7, 8])[:3] == (9, 10, 11)


def test_nothing_is_guessed_where_nothing_is_alike() -> None:
    guesses = NgramSpeculation()
    assert guesses.next([]) == ()
    assert guesses.next([3]) == ()
    assert guesses.next([3, 4]) == ()
    assert guesses.next([3, 4, 5, 4]) == ()  # one token alone is alike nearly everywhere


def test_the_longest_match_is_followed_and_among_those_the_latest() -> None:
    assert NgramSpeculation().next([5, 1, 2, 30, 6, 1, 2, 40, 9, 5, 1, 2])[0] == 30
    assert NgramSpeculation().next([5, 1, 2, 30, 5, 1, 2, 40, 9, 5, 1, 2])[0] == 40


def test_a_text_that_goes_round_is_guessed_to_go_on_so() -> None:
    assert NgramSpeculation().next([4, 5, 6, 4, 5]) == tuple(islice([6, 4, 5] * MAX_SPECULATED, MAX_SPECULATED))


def test_an_end_of_the_text_is_not_guessed_nor_what_would_be_behind_it() -> None:
    assert NgramSpeculation().next([7, 8, 9, 0, 11, 7, 8], ends={0}) == (9,)
    assert NgramSpeculation().next([7, 8, 0, 11, 7, 8], ends={0}) == ()


def test_what_is_too_long_ago_is_not_found() -> None:
    far = list(range(100, 100 + 5000))
    assert NgramSpeculation().next([7, 8, 9, *far[:4000], 7, 8])[0] == 9
    assert NgramSpeculation().next([7, 8, 9, *far, 7, 8]) == ()
    guesses, tokens = NgramSpeculation(), [7, 8, 9]
    for token in (*far, 7, 8):  # one by one it is the same
        guesses.next(tokens)
        tokens.append(token)
    assert guesses.next(tokens) == ()


def test_how_often_it_is_right_is_learned_whether_the_guesses_were_used_or_not() -> None:
    right, wrong = NgramSpeculation(), NgramSpeculation()
    for step in range(40):
        right.next([1, 2, 3] * (4 + step))
        wrong.next([1, 2, 3, 1, 2, *(token for number in range(step) for token in (1000 + number, 1, 2))])
    assert right.rate > 0.95
    assert wrong.rate < 0.1


def _varied(period: int) -> Iterator[int]:
    for number in count():
        yield from range(period)
        yield number


HOSTILE: dict[str, Callable[[], Iterator[int]]] = {
    "one token": lambda: iter(lambda: 1, None),
    "two in turns": lambda: (number % 2 for number in count()),
    "the same pair, each time followed by another": lambda: (token for number in count(10) for token in (1, 2, number)),
    "a long period": lambda: _varied(700),
    "nothing twice": lambda: iter(range(1 << 30)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_text_makes_a_guess_expensive(kind: str) -> None:
    """A prompt costs a bounded amount per token of the window, whatever its length, and a generated token no more."""
    tokens = Counted(list(islice(HOSTILE[kind](), 20_000)))
    guesses = NgramSpeculation()
    guesses.next(tokens)
    assert tokens.looks <= 2 * 4096 + 300
    for token in islice(HOSTILE[kind](), 200):
        tokens.tokens.append(token)
        tokens.looks = 0
        guesses.next(tokens)
        assert tokens.looks <= 300


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=60))
def test_any_text_takes_bounded_work_however_it_has_grown(head: list[int], tail: list[int]) -> None:
    tokens = Counted(head)
    guesses = NgramSpeculation()
    guesses.next(tokens)
    for token in tail:
        tokens.tokens.append(token)
        tokens.looks = 0
        found = guesses.next(tokens)
        assert tokens.looks <= 300
        assert found == NgramSpeculation().next(tokens.tokens)
        assert len(found) <= MAX_SPECULATED
        assert 0.0 < guesses.rate < 1.0
