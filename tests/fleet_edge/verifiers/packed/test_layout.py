from collections.abc import Sequence

import pytest
import torch

from fleet_edge.verifiers.packed.kv import Slab, Slot
from fleet_edge.verifiers.packed.layout import FEW_ROWS, Indices, Layout, SequenceSpan, lay_out


def _slab(capacity: int = 64) -> Slab:
    return Slab(keys=[], values=[], slots=32, capacity=capacity)


def _lay_out(parts: Sequence[SequenceSpan]) -> Layout:
    indices = Indices(torch.device("cpu"))
    layout = lay_out(parts, indices)
    indices.send()
    covered = sorted(row for group in layout.groups for row in range(group.begin, group.end))
    assert covered == list(range(layout.rows)) == list(range(sum(part.count for part in parts)))
    assert sorted(layout.order) == list(range(len(parts)))
    for write in layout.writes:
        assert len(write.slots) == len(write.places) == write.end - write.begin
    return layout


def test_neighbours_with_few_rows_share_a_call_without_an_index() -> None:
    slab = _slab()
    layout = _lay_out([SequenceSpan(Slot(slab, index), 10 + index, 5) for index in (2, 0, 1)])
    (group,) = layout.groups
    assert (group.first, group.sequences, group.width) == (0, 3, 5)
    assert group.gather is None
    assert layout.order == (1, 2, 0)
    assert layout.starts == (10, 0, 5)


def test_ragged_neighbours_are_padded_to_the_widest() -> None:
    slab = _slab()
    layout = _lay_out([SequenceSpan(Slot(slab, 0), 7, 1), SequenceSpan(Slot(slab, 1), 3, 3)])
    (group,) = layout.groups
    assert group.scatter.tensor.tolist() == [0, 3, 4, 5]
    assert group.positions.tensor.tolist() == [7, 7, 7, 3, 4, 5]
    assert (group.lowest, group.longest) == (3, 8)


@pytest.mark.parametrize(("capacity", "calls"), [(64, 1), (256, 1), (384, 2), (1024, 2)])
def test_idle_slots_between_are_computed_along_while_that_is_cheaper(capacity: int, calls: int) -> None:
    slab = _slab(capacity)
    layout = _lay_out([SequenceSpan(Slot(slab, 0), 7, 2), SequenceSpan(Slot(slab, 3), 3, 2)])
    assert len(layout.groups) == calls


def test_a_prefill_is_a_call_of_its_own_and_slabs_do_not_mix() -> None:
    one, other = _slab(), _slab()
    parts = [
        SequenceSpan(Slot(one, 0), 0, FEW_ROWS + 1),
        SequenceSpan(Slot(one, 1), 5, 2),
        SequenceSpan(Slot(one, 2), 5, 2),
        SequenceSpan(Slot(other, 0), 5, 2),
    ]
    layout = _lay_out(parts)
    assert sorted(group.width for group in layout.groups) == [2, 2, FEW_ROWS + 1]
    assert len(layout.writes) == 2
