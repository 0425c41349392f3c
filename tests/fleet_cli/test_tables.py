import string
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any, get_args

import pytest
from hypothesis import given, settings, strategies as st

from fleet_admin.columns import ABSENT, Column, Kind, shown
from fleet_cli.tables import table_lines

TEXTS = ("text", "sentence", "state", "id", "number")
NUMBERS: list[Kind] = [kind for kind in get_args(Kind) if kind not in TEXTS]
WIDTHS = (80, 60)

# Without digits, so that every word with a digit is a number.
words = st.text(string.ascii_letters + " -äß漢", min_size=1, max_size=40).map(str.strip).filter(bool)
numbers = st.none() | st.floats(-1e9, 1e12, allow_nan=False) | st.floats(1e-3, 1.0)
times = st.none() | st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


def values(kind: Kind) -> st.SearchStrategy[Any]:
    if kind in ("moment", "day", "month", "ago"):
        return times
    return numbers if kind in NUMBERS else st.none() | words


@dataclass(frozen=True)
class Table:
    columns: list[Column[tuple[Any, ...]]]
    rows: list[tuple[Any, ...]]
    sort: str


@st.composite
def tables(draw: st.DrawFn) -> Table:
    drawn = st.sampled_from([each for each in get_args(Kind) if each != "number"])
    kinds = ["text", *draw(st.lists(drawn, max_size=14))]
    headings = draw(st.lists(words.map(lambda word: word[:14].strip()), min_size=len(kinds), max_size=len(kinds)))
    columns: list[Column[tuple[Any, ...]]] = [
        Column(heading, itemgetter(place), kind, key=f"c{place}", rank=draw(st.integers(1, 3)))
        for place, (kind, heading) in enumerate(zip(kinds, headings, strict=True))
    ]
    rows = draw(st.lists(st.tuples(*map(values, kinds)), min_size=1, max_size=6))
    return Table(columns, rows, draw(st.sampled_from([column.key for column in columns])))


def numbers_of(table: Table, place: int) -> list[str]:
    kind = table.columns[place].kind
    found = [shown(row[place], kind) for row in table.rows]
    if kind in ("moment", "ago"):
        found = [each.rpartition(":")[0] or each for each in found]
    return [word for each in found for word in each.split() if any(character.isdigit() for character in word)]


@pytest.mark.parametrize("width", WIDTHS)
@given(table=tables())
@settings(deadline=None, max_examples=80)
def test_no_number_is_cut(width: int, table: Table) -> None:
    lines = table_lines(table.columns, table.rows, width=width, sort=table.sort)
    hidden = int(lines[-1].split()[0]) if "hidden" in lines[-1] else 0
    body = lines[:-1] if hidden else lines
    assert max(map(len, body)) <= width
    seen = Counter(word for line in body for word in line.split() if any(each.isdigit() for each in word))
    whole = {
        place: Counter(numbers_of(table, place)) for place, each in enumerate(table.columns) if each.kind in NUMBERS
    }
    # Each number shown is complete, and appears as often as in the visible columns.
    assert not seen - sum(whole.values(), Counter())
    sorted_by = next(place for place, each in enumerate(table.columns) if each.key == table.sort)
    assert not whole.get(sorted_by, Counter()) - seen
    columns_with_a_value = [
        each
        for place, each in enumerate(table.columns)
        if place == 0 or each.key == table.sort or any(row[place] is not None for row in table.rows)
    ]
    assert hidden < len(columns_with_a_value)


@given(table=tables())
@settings(deadline=None, max_examples=50)
def test_a_pipe_gets_all_columns_each_row_in_one_line(table: Table) -> None:
    headings, _, *body = table_lines(table.columns, table.rows, width=None)
    assert len(body) == len(table.rows)
    for column in table.columns:
        assert column.heading in headings
    for row, line in zip(table.rows, body, strict=True):
        for value, column in zip(row, table.columns, strict=True):
            assert shown(value, column.kind) in line


def test_the_highest_rank_goes_first_and_what_says_nothing_before() -> None:
    columns: list[Column[int]] = [
        Column("device", lambda _: "gateway-00017"),
        Column("tokens", lambda row: row, "count"),
        Column("empty", lambda _: None, "count"),
        Column("errors", lambda row: 10**12 + row, "count", rank=2),
        Column("why", lambda _: "The draft model is gone. " * 3, "sentence", rank=0),
    ]
    wide, narrow, narrowest = ("\n".join(table_lines(columns, [1, 2], width=width)) for width in (80, 50, 20))
    assert "errors" in wide
    assert "hidden" not in wide
    assert "empty" not in wide
    assert "1 column hidden" in narrow
    assert "tokens" in narrow
    assert "errors" not in narrow
    assert "2 columns hidden" in narrowest
    assert "why" in narrowest


def test_an_id_is_as_long_as_tells_the_rows_apart() -> None:
    column: Column[str] = Column("session", lambda row: row, "id")
    one, other = "a" * 16, "a" * 9 + "b" * 7
    assert table_lines([column], [one, other], width=80)[2:] == [one[:10], other[:10]]
    assert table_lines([column], [one, other], width=None)[2:] == [one, other]


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (93_268_800, "bytes", "93.3 MB"),
        (999.6, "bytes", "1.00 kB"),
        (512, "bytes", "512 B"),
        (1_182.4, "ms", "1,182 ms"),
        (61_000, "ms", "61.0 s"),
        (0.7504, "percent", "75.0 %"),
        (None, "count", ABSENT),
        (True, "text", "yes"),
        (datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC), "moment", "2026-03-04 05:06:07"),
        (datetime(2026, 3, 4, tzinfo=UTC) - timedelta(hours=1), "ago", "2026-03-03 23:00:00"),
    ],
)
def test_values_have_their_units(value: object, kind: Kind, expected: str) -> None:
    assert shown(value, kind) == expected
