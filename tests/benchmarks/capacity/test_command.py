import sys
from pathlib import Path

import pytest

from benchmarks.capacity.arrivals import Arrivals
from benchmarks.capacity.command import cells, read
from benchmarks.capacity.picture import draw
from benchmarks.capacity.rows import Row, table
from benchmarks.capacity.systems import ALL
from schemas.errors import FleetError


def row(system: str, devices: int, at_level: int, draft: str = "Q4_0") -> Row:
    return Row(system, draft, 1, devices, 20.0, 0.0, Arrivals.AT_ONCE, tokens_per_s=50.0, clients_at_level=at_level)


def test_the_systems_have_the_names_that_results_are_compared_by() -> None:
    assert set(ALL) == {
        "edge-streaming", "edge-streaming-residual", "raw-engine", "co-located", "dssd-dense",
        "ours-residual", "ours-coupled", "ours-ahead", "ours-auto",
    }  # fmt: skip


def test_what_needs_no_draft_model_is_measured_once_for_all() -> None:
    grid = list(cells(read(["--arrivals", "at-once", "--devices", "1", "16", "--costs", "1"])))
    assert len(grid) == 2 * (3 + 2 * 3)
    assert [cell.draft for cell in grid if cell.system == "raw-engine"] == ["", ""]
    assert len(set(grid)) == len(grid)


def test_poisson_arrivals_are_measured_at_one_load_unless_all_of_it_is_asked_for() -> None:
    few = [cell for cell in cells(read([])) if cell.arrivals is Arrivals.POISSON]
    assert {(cell.cost, cell.devices, cell.draft) for cell in few} == {(1, 16, ""), (1, 16, "Q4_0")}
    whole = [cell for cell in cells(read(["--whole"])) if cell.arrivals is Arrivals.POISSON]
    alone = [cell for cell in cells(read(["--arrivals", "poisson"])) if cell.arrivals is Arrivals.POISSON]
    assert whole == alone
    assert {cell.devices for cell in whole} == {1, 4, 16, 64}


def test_the_table_has_a_line_for_each_system_and_a_column_for_each_load() -> None:
    rows = [row("ours-auto", 1, 1), row("ours-auto", 16, 12), row("raw-engine", 16, 7, draft="")]
    lines = table(rows).splitlines()
    assert [line.split() for line in lines[-3:]] == [
        ["devices", "1", "16"],
        ["ours-auto", "1", "(50.0/s)", "12", "(50.0/s)"],
        ["raw-engine", "-", "7", "(50.0/s)"],
    ]


def test_figures_that_the_load_itself_has_limited_are_marked() -> None:
    free, bound = row("ours-auto", 16, 12), row("dssd-dense", 16, 3)
    free.load_cpu, bound.load_cpu = 0.5, 0.97
    lines = table([free, bound]).splitlines()
    assert [line.split()[-1] for line in lines[-3:-1]] == ["(50.0/s)", "(50.0/s)*"]
    assert "the edge might have done more" in lines[-1]


def test_a_cost_at_which_nothing_drafts_has_a_table_too() -> None:
    assert "target of 1 times the cost, draft -," in table([row("edge-streaming", 1, 1, draft="")])


def test_without_matplotlib_a_picture_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FleetError, match=r"pip install 'dssd-fleet\[bench\]'"):
        draw([row("ours-auto", 1, 1)], tmp_path / "picture.png")


def test_a_picture_is_drawn_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw([row("ours-auto", 1, 1), row("ours-auto", 16, 12), row("raw-engine", 16, 7, draft="")], tmp_path / "it.png")
    assert (tmp_path / "it.png").stat().st_size > 0
