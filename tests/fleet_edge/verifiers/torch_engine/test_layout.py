import torch

from fleet_edge.verifiers.torch_engine.layout import FEW_ROWS, Indices, SequenceSpan, StepLayout, lay_out


def _lay_out(parts: list[SequenceSpan], *, max_pages: int = 100) -> StepLayout:
    indices = Indices(torch.device("cpu"))
    layout = lay_out(parts, indices, max_pages=max_pages)
    indices.send()
    covered = [row for group in layout.groups for row in range(group.begin, group.end)]
    assert covered == list(range(layout.rows)) == list(range(sum(part.count for part in parts)))
    assert sorted(layout.order) == list(range(len(parts)))
    assert len(layout.places) == layout.rows
    return layout


def test_sequences_with_as_many_rows_need_no_index() -> None:
    layout = _lay_out([SequenceSpan([page], start, 5) for page, start in ((4, 12), (7, 10), (2, 11))])
    (group,) = layout.groups
    assert (group.sequences, group.width, group.gather) == (3, 5, None)
    assert group.pages.tensor.tolist() == [7, 2, 4]  # shorter ones first
    assert layout.starts == (10, 0, 5)
    assert layout.places.tensor.tolist()[:5] == [7 * 64 + 10 + offset for offset in range(5)]


def test_ragged_sequences_are_padded_to_the_widest_and_the_longest() -> None:
    layout = _lay_out([SequenceSpan([3], 7, 1), SequenceSpan([5, 1], 63, 3)])
    (group,) = layout.groups
    assert group.scatter is not None
    assert group.scatter.tensor.tolist() == [0, 3, 4, 5]
    assert group.positions.tensor.tolist() == [7, 7, 7, 63, 64, 65]
    assert group.pages.tensor.tolist() == [3, 0, 5, 1]
    assert (group.lowest, group.longest) == (7, 66)
    assert layout.places.tensor.tolist() == [3 * 64 + 7, 5 * 64 + 63, 64, 65]


def test_a_prefill_and_what_exceeds_the_pages_of_a_call_are_calls_of_their_own() -> None:
    parts = [SequenceSpan([0], 0, FEW_ROWS + 1), *(SequenceSpan([page, page + 1], 70, 2) for page in (1, 3, 5))]
    groups = _lay_out(parts, max_pages=4).groups
    assert sorted((group.sequences, group.width) for group in groups) == [(1, 2), (1, FEW_ROWS + 1), (2, 2)]


def test_pages_before_a_window_are_not_gathered() -> None:
    (group,) = _lay_out([SequenceSpan([8, 9, 4], 150, 2)]).groups
    pages, seen, mask = group.seen(16, heads=1, dtype=torch.float32)
    assert pages.tolist() == [4]
    assert (seen.start, seen.stop) == (150 - 15 - 128, 152 - 128)
    assert mask.shape == (1, 1, 2, 17)
