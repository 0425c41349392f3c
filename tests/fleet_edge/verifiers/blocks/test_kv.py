import random

import numpy as np
import pytest

from fleet_edge.verifiers.blocks.geometry import Pool
from fleet_edge.verifiers.blocks.kv import PAGE, Pages, ProcessMemory

POOLS = [Pool(2, 1, 4), Pool(1, 2, 8)]


def _pages(count: int) -> Pages:
    return Pages(ProcessMemory(POOLS, count))


class Sequences:
    """Sequences that write their own marks; each must read what it wrote, whatever the others do."""

    def __init__(self, count: int) -> None:
        self.pages = _pages(count)
        self.marks: dict[int, list[int]] = {}
        self._next = 0

    def lengths(self) -> list[tuple[int, int]]:
        return [(sequence, len(marks)) for sequence, marks in self.marks.items()]

    def write(self, sequence: int, count: int) -> None:
        marks = self.marks[sequence]
        self.pages.reserve(sequence, len(marks), count)
        for _ in range(count):
            self._next = self._next % 60_000 + 1
            page, place = self.pages.table(sequence)[len(marks) // PAGE], len(marks) % PAGE
            for keys, values in zip(self.pages.keys, self.pages.values, strict=True):
                keys[page, :, :, :, place] = values[page, :, :, place] = self._next
            marks.append(self._next)

    def check(self) -> None:
        for sequence, marks in self.marks.items():
            for begin in range(0, len(marks), PAGE):
                own = np.array(marks[begin : begin + PAGE])
                page = self.pages.table(sequence)[begin // PAGE]
                for keys, values in zip(self.pages.keys, self.pages.values, strict=True):
                    assert (keys[page, ..., : len(own)] == own).all()
                    assert (values[page, :, :, : len(own)] == own[:, None]).all()


@pytest.mark.parametrize("seed", range(8))
def test_sequences_read_what_they_wrote_and_all_pages_return(seed: int) -> None:
    rng, its = random.Random(seed), Sequences(14)
    for number in range(80):
        open_ = list(its.marks)
        action = rng.random()
        if not open_ or action < 0.2:
            its.marks[number] = []
        elif action < 0.35:
            source = rng.choice(open_)
            length = rng.randint(0, len(its.marks[source]))
            its.pages.fork(number, source, length)
            its.marks[number] = its.marks[source][:length]
        elif action < 0.5:
            sequence = rng.choice(open_)
            length = rng.randint(0, len(its.marks[sequence]))
            its.pages.truncate(sequence, length)
            del its.marks[sequence][length:]
        elif action < 0.6:
            its.pages.close(sequence := rng.choice(open_))
            del its.marks[sequence]
        else:
            sequence, count = rng.choice(open_), rng.randint(1, 100)
            free = its.pages.count - its.pages.used
            if its.pages.needed(sequence, len(its.marks[sequence]), count) <= free:
                its.write(sequence, count)
        its.check()
    for sequence in list(its.marks):
        its.pages.close(sequence)
    assert its.pages.used == 0


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_the_room_is_exact_for_the_worst_use_and_a_bound_with_forks(seed: int, forked: bool) -> None:
    rng, its = random.Random(seed), Sequences(10)
    for sequence in range(4):
        its.marks[sequence] = []
        its.write(sequence, rng.randint(0, 2 * PAGE))
    if forked:
        its.pages.fork(9, 0, len(its.marks[0]))
        its.marks[9] = list(its.marks[0])
    room = its.pages.room(its.lengths())
    # The worst use: one token each for those whose next token takes a page, then those with the least left.
    used = 0
    while True:
        needs = [(its.pages.needed(key, length, 1), -length % PAGE, key) for key, length in its.lengths()]
        at_once = [key for pages, _, key in needs if pages]
        key = at_once[0] if at_once else min(needs, key=lambda need: need[1])[2]
        if its.pages.needed(key, len(its.marks[key]), 1) > its.pages.count - its.pages.used:
            break
        its.write(key, 1)
        used += 1
    assert room <= used if forked else room == used


def test_a_fork_takes_no_page_until_it_is_written_to() -> None:
    its = Sequences(3)
    its.marks[1] = []
    its.write(1, PAGE + 5)
    its.pages.fork(2, 1, PAGE + 3)
    its.marks[2] = its.marks[1][: PAGE + 3]
    assert its.pages.used == 2
    its.write(2, 1)
    assert its.pages.used == 3
    its.check()
    its.pages.close(1)
    assert its.pages.used == 2
