"""Filters of rows: one meaning, whether the database or Python applies them."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Table, func, not_, or_

from fleet_edge.session_log.tables import AUDIT, COMMANDS, EVENTS, SESSIONS

_COMPARED: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
OPERATORS: Final = ("=", "!=", "~", "!~", *_COMPARED)

SESSION_FIELDS: Final = frozenset(SESSIONS.c.keys()) - {"tokens"}
"""Fields that `SessionLog.sessions` filters by; also the labels of the device, by `=` alone."""

EVENT_FIELDS: Final = frozenset(EVENTS.c.keys())
AUDIT_FIELDS: Final = frozenset(AUDIT.c.keys())
COMMAND_FIELDS: Final = frozenset(COMMANDS.c.keys())


@dataclass(frozen=True, slots=True)
class Filter:
    """A condition on a field: equal, unequal, containing a text or not, or compared by size.

    A `value` of None stands for no value. A row without a value is unequal to every value, and neither below nor above
    any. Of several `=` and `~` for one field, one has to be met.
    """

    field: str
    operator: str  # one of `OPERATORS`
    value: Any

    @property
    def alternative(self) -> bool:
        return self.operator in {"=", "~"}


def is_met(found: Filter, value: Any) -> bool:  # noqa: ANN401 - of any column
    """Apply a filter to a row's value; of several values, one has to meet it."""
    if found.operator.startswith("!"):
        return not is_met(Filter(found.field, found.operator[1:], found.value), value)
    if isinstance(value, tuple):
        return any(is_met(found, each) for each in value) if value else found.value is None
    if found.value is None:
        return value is None or value == ""
    if value is None:
        return False
    if found.operator == "~":
        return str(found.value).casefold() in str(value).casefold()
    return bool(value == found.value if found.operator == "=" else _COMPARED[found.operator](value, found.value))


def are_met(filters: Iterable[Filter], value_of: Callable[[Filter], Any]) -> bool:
    """Apply filters to a row; `value_of` returns the value that a filter is about."""
    open_fields, met = set[str](), set[str]()
    for each in filters:
        holds = is_met(each, value_of(each))
        if each.alternative:
            (met if holds else open_fields).add(each.field)
        elif not holds:
            return False
    return open_fields <= met


def condition(column: ColumnElement[Any], found: Filter) -> ColumnElement[bool]:
    """Return a filter as SQL."""
    if found.operator.startswith("!"):
        own = condition(column, Filter(found.field, found.operator[1:], found.value))
        return not_(own) if found.value is None else or_(column.is_(None), not_(own))
    if found.value is None:
        return or_(column.is_(None), column == "") if column.type.python_type is str else column.is_(None)
    if found.operator == "~":
        return func.lower(column).contains(str(found.value).lower(), autoescape=True)
    compared: ColumnElement[bool] = (
        column == found.value if found.operator == "=" else _COMPARED[found.operator](column, found.value)
    )
    return compared


def conditions(table: Table, filters: Sequence[Filter]) -> list[ColumnElement[bool]]:
    """Return the conditions of filters on columns of a table."""
    alternatives: dict[str, list[ColumnElement[bool]]] = {}
    for each in filters:
        if each.alternative:
            alternatives.setdefault(each.field, []).append(condition(table.c[each.field], each))
    others = (condition(table.c[each.field], each) for each in filters if not each.alternative)
    return [*(or_(*either) for either in alternatives.values()), *others]
