from dataclasses import dataclass, replace

import pytest

from fleet_admin.columns import Column
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.grid import Grid, matches
from fleet_admin.dashboard.rendering import filled


@dataclass(frozen=True)
class Row:
    name: str | None
    share: float | None = None
    tokens: int = 0


NAME: Column[Row] = Column("name", lambda row: row.name)
SHARE: Column[Row] = Column("share", lambda row: row.share, "percent")
TOKENS: Column[Row] = Column("tokens", lambda row: row.tokens, "count", rank=3)
GRID: Grid[Row] = Grid((NAME, SHARE, TOKENS), sort="name")
ROWS = [Row("beta", 0.5, 3), Row("Alpha", 0.25, 20), Row("gamma", None, 1)]


def test_a_column_of_sentences_that_no_row_has_is_left_out() -> None:
    why: Column[Row] = Column("why", lambda row: row.name if row.share is None else None, "sentence")
    assert filled((NAME, why), ROWS) == [NAME, why]
    assert filled((NAME, why), ROWS[:2]) == [NAME]


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("lph", True),
        ("ALPHA", True),
        ("=alpha", True),
        ("=alph", False),
        ("!lph", False),
        ("!=beta", True),
        ("-", False),
    ],
)
def test_a_text_is_chosen_by_a_part_of_it(text: str, holds: bool) -> None:
    assert matches(NAME, Row("Alpha"), text) is holds


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("50", True),
        (">49.9", True),
        (">50", False),
        ("<=50", True),
        ("40..60", True),
        ("..40", False),
        ("60..", False),
        ("!50", False),
    ],
)
def test_a_share_is_chosen_in_percent(text: str, holds: bool) -> None:
    assert matches(SHARE, Row("x", 0.5), text) is holds


def test_none_is_chosen_by_a_dash_and_by_nothing_else() -> None:
    assert matches(SHARE, Row("x"), "-")
    assert not matches(SHARE, Row("x"), "<5")
    assert matches(SHARE, Row("x"), "!50")


def test_rows_are_sorted_without_regard_to_capitals_and_those_without_a_value_come_last() -> None:
    assert [row.name for row in GRID.view(ROWS, {}).rows] == ["Alpha", "beta", "gamma"]
    assert [row.name for row in GRID.view(ROWS, {"sort": ("-share",)}).rows] == ["beta", "Alpha", "gamma"]
    assert [row.name for row in GRID.view(ROWS, {"sort": ("share",)}).rows] == ["Alpha", "beta", "gamma"]


def test_a_few_columns_have_a_field_and_any_other_is_chosen_by_name() -> None:
    grid: Grid[Row] = Grid((NAME, *(replace(SHARE, key=f"share{number}") for number in range(9)), TOKENS), sort="name")
    assert [column.key for column in grid.view(ROWS, {}).fields] == ["name", "share0", "share1", "share2", "share3"]
    view = grid.view(ROWS, {"column": ("tokens",), "value": (">2",)})
    assert [row.name for row in view.found] == ["Alpha", "beta"]
    assert view.fields[-1] is TOKENS


@pytest.mark.parametrize(
    "query",
    [
        {"column": ("secret",), "value": ("1",)},
        {"sort": ("secret",)},
        {"columns": ("a; drop table devices",)},
        {"page": ("0",)},
        {"page": ("x",)},
    ],
)
def test_what_a_grid_does_not_have_is_refused(query: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(Problem):
        GRID.view(ROWS, query)


def test_a_long_grid_has_pages_and_its_csv_has_all() -> None:
    view = GRID.view([Row(f"n{number:04}") for number in range(250)], {"page": ("3",)})
    assert (view.page, view.pages, len(view.rows), len(view.lines())) == (3, 3, 50, 250)
