import argparse

from benchmarks.capacity.devices import Arrivals
from benchmarks.capacity.suite import THROUGH_BROKER, add_options, cells


def read(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(words)


def test_the_systems_have_the_names_that_results_are_compared_by() -> None:
    assert set(THROUGH_BROKER) == {
        "edge-streaming", "edge-streaming-residual", "dssd-dense", "ours-residual", "ours-coupled", "ours-ahead",
        "ours-auto",
    }  # fmt: skip


def test_what_needs_no_draft_model_is_measured_once_for_all() -> None:
    grid = list(cells(read("--arrivals", "at-once", "--devices", "1", "16", "--costs", "1")))
    assert len(grid) == 2 * (3 + 2 * 3)
    assert [cell.draft for cell in grid if cell.system == "raw-engine"] == ["", ""]
    assert len(set(grid)) == len(grid)


def test_poisson_arrivals_are_measured_at_one_load_unless_all_of_it_is_asked_for() -> None:
    few = [cell for cell in cells(read()) if cell.arrivals is Arrivals.POISSON]
    assert {(cell.cost, cell.devices, cell.draft) for cell in few} == {(1, 16, ""), (1, 16, "Q4_0")}
    whole = [cell for cell in cells(read("--whole")) if cell.arrivals is Arrivals.POISSON]
    alone = [cell for cell in cells(read("--arrivals", "poisson")) if cell.arrivals is Arrivals.POISSON]
    assert whole == alone
    assert {cell.devices for cell in whole} == {1, 4, 16, 64}
