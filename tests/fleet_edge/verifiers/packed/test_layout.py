import torch

from fleet_edge.verifiers.packed.layout import FEW_ROWS, Layout, Part, lay_out
from fleet_edge.verifiers.paged import PAGE

CPU = torch.device("cpu")


def part(start: int, count: int, *, first: int = 0) -> Part:
    """Return a part of a sequence whose pages are every second one."""
    pages = -(-(start + count) // PAGE)
    return Part(range(first, first + 2 * pages, 2), start, count)


def sizes(layout: Layout) -> list[tuple[int, ...]]:
    return [tuple(group.places.shape) for group in layout.groups]


def test_tokens_are_where_their_pages_are() -> None:
    places = part(PAGE, 2, first=3).places().tolist()
    assert places == [*range(3 * PAGE, 4 * PAGE), 5 * PAGE, 5 * PAGE + 1]


def test_sequences_of_like_lengths_share_a_call_and_are_padded() -> None:
    layout = lay_out([part(10, 1), part(20, 3)], CPU)
    (group,) = layout.groups
    assert group.rows.tolist() == [[0, 0, 0], [1, 2, 3]]
    assert group.positions.tolist() == [[10, 10, 10], [20, 21, 22]]
    assert (group.own.tolist(), group.answers.tolist()) == ([0, 1, 2, 3], [0, 3, 4, 5])
    assert layout.positions.tolist() == [10, 20, 21, 22]
    assert sizes(layout) == [(2, 23)]


def test_prefills_and_sequences_of_unlike_lengths_are_calls_of_their_own() -> None:
    layout = lay_out([part(5000, 1), part(3, FEW_ROWS + 1), part(100, 2), part(200, 2)], CPU)
    assert sizes(layout) == [(1, FEW_ROWS + 4), (2, 202), (1, 5001)]
    answered = torch.cat([group.own for group in layout.groups])
    assert sorted(answered.tolist()) == list(range(1 + FEW_ROWS + 1 + 4))
