"""Merge rules: how a column of the session log takes in the values of another record.

A table's columns declare their rules once (`views`, `tables`). `merge` makes the upsert of each table from them, and
`merged` applies them to two records of a batch. Every rule is idempotent and commutes, so records can be spooled,
grouped and replayed freely. An absent value is unknown: it changes nothing, unless its group is replaced.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum, auto
from typing import Any, Final, get_args, get_type_hints

Values = Mapping[str, Any]
"""Values of a row by column."""


class Kind(Enum):
    KEY = auto()
    ONCE = auto()  # the first known value stays: all records have the same
    LEAST = auto()
    GREATEST = auto()
    FIRST = auto()  # with its group, from the record with the least order
    LATEST = auto()  # with its group, from the record with the greatest order


@dataclass(frozen=True, slots=True)
class Rule:
    """A column's rule. `by` are the columns whose values order the records of a group, the first one deciding.

    A record that has the first of them replaces the group as a whole; columns that it leaves out become NULL, or stay
    if `stays`: then all records MUST have the value that come after the first with one.
    """

    kind: Kind
    by: tuple[str, ...] = ()
    stays: bool = False


KEY: Final = Rule(Kind.KEY)
ONCE: Final = Rule(Kind.ONCE)
LEAST: Final = Rule(Kind.LEAST)
GREATEST: Final = Rule(Kind.GREATEST)


def latest(*by: str) -> Rule:
    return Rule(Kind.LATEST, by)


def latest_known(*by: str) -> Rule:
    return Rule(Kind.LATEST, by, stays=True)


def first(by: str) -> Rule:
    return Rule(Kind.FIRST, (by,))


def stored(view: type) -> dict[str, tuple[Any, Rule | None]]:
    """Return type and rule of a view's stored fields: those with a rule, or all if none has one."""
    hints = get_type_hints(view, include_extras=True)
    found = {}
    for field in fields(view):
        kind, *marks = (
            get_args(hints[field.name]) if hasattr(hints[field.name], "__metadata__") else (hints[field.name],)
        )
        found[field.name] = kind, next((each for each in marks if isinstance(each, Rule)), None)
    if any(rule is not None for _, rule in found.values()):
        return {name: entry for name, entry in found.items() if entry[1] is not None}
    return found


def groups_of(rules: Mapping[str, Rule]) -> dict[Rule, list[str]]:
    """Return the columns that are replaced together."""
    groups: dict[Rule, list[str]] = {}
    for name, rule in rules.items():
        if rule.by:
            groups.setdefault(rule, []).append(name)
    return groups


def replaces(rule: Rule, old: Values, new: Values) -> bool:
    """Decide whether a group of `new` replaces that of `old`."""
    if rule.kind is Kind.FIRST:
        (by,) = rule.by
        return old.get(by) is None or new[by] < old[by]
    # None is less than any value.
    before, after = ([(values.get(each) is not None, values.get(each)) for each in rule.by] for values in (old, new))
    return after > before


def merged(rules: Mapping[str, Rule], groups: Mapping[Rule, list[str]], old: Values, new: Values) -> dict[str, Any]:
    """Return the values of a row after another record."""
    row = dict(old)
    for name, value in new.items():
        rule = rules[name]
        if rule.by or value is None:
            continue
        known = row.get(name)
        if known is None or (
            value < known if rule.kind is Kind.LEAST else rule.kind is Kind.GREATEST and value > known
        ):
            row[name] = value
    for rule, names in groups.items():
        if rule.by[0] in new and replaces(rule, old, new):
            taken = (name for name in names if name in new or name in row)
            row |= {name: new.get(name) for name in taken if not rule.stays or new.get(name) is not None}
    return row
