"""A filter chooses the same rows in the database and in Python."""

from operator import attrgetter, itemgetter
from typing import Any

import pytest
from hypothesis import given, strategies as st
from sqlalchemy import Column, Float, Integer, MetaData, String, Table, create_engine, insert, select

from fleet_edge.session_log.filters import OPERATORS, Filter, are_met, conditions, is_met

ROWS = Table("rows", MetaData(), Column("id", Integer), Column("name", String), Column("share", Float))
ENGINE = create_engine("sqlite://")
NAMES = (None, "a", "b", "A", "ab", "50%", "a_b", "axb", "50x", "")
SHARES = (None, 0.0, 0.5, 1.0)

names = st.builds(Filter, st.just("name"), st.sampled_from(("=", "!=", "~", "!~")), st.sampled_from(NAMES[1:-1]))
shares = st.builds(
    Filter,
    st.just("share"),
    st.sampled_from([each for each in OPERATORS if "~" not in each]),
    st.sampled_from(SHARES[1:]),
)
absent = st.builds(Filter, st.sampled_from(("name", "share")), st.sampled_from(("=", "!=")), st.none())
rows = st.lists(st.fixed_dictionaries({"name": st.sampled_from(NAMES), "share": st.sampled_from(SHARES)}), max_size=6)


@given(rows=rows, filters=st.lists(names | shares | absent, max_size=4))
def test_the_database_and_python_choose_alike(rows: list[dict[str, Any]], filters: list[Filter]) -> None:
    numbered = [{**row, "id": number} for number, row in enumerate(rows)]
    with ENGINE.begin() as connection:
        ROWS.metadata.drop_all(connection)
        ROWS.metadata.create_all(connection)
        if numbered:
            connection.execute(insert(ROWS), numbered)
        stored = connection.scalars(select(ROWS.c.id).where(*conditions(ROWS, filters)).order_by(ROWS.c.id)).all()
    field = attrgetter("field")
    assert stored == [row["id"] for row in numbered if are_met(filters, lambda each: itemgetter(field(each))(row))]  # noqa: B023


@pytest.mark.parametrize(
    ("sign", "wanted", "value", "met"),
    [
        ("=", "a", ("a", "b"), True),
        ("=", "c", ("a", "b"), False),
        ("!=", "a", ("a", "b"), False),
        ("!=", "c", ("a", "b"), True),
        ("=", None, (), True),
        ("=", None, ("a",), False),
        ("!=", "a", None, True),
        ("<", 5, None, False),
        ("~", "LPH", "Alpha", True),
        ("=", "alpha", "Alpha", False),
    ],
)
def test_of_several_values_one_has_to_meet_a_filter(sign: str, wanted: object, value: object, met: bool) -> None:
    assert is_met(Filter("x", sign, wanted), value) is met
