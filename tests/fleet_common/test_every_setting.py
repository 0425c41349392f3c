import re
from datetime import date
from typing import Any

import pytest
from hypothesis import given, strategies as st

from fleet_common.settings import SECTIONS, SettingField, Settings, SettingsError, fields_of, load_settings
from fleet_device.settings import DeviceSettings
from fleet_edge.settings import EdgeSettings

PROGRAMS = (DeviceSettings, EdgeSettings)
EVERY = [
    pytest.param(model, field, id=f"{model.__name__}.{field.name}") for model in PROGRAMS for field in fields_of(model)
]
IN_A_FILE = {"quotas", "quarantine", "metrics", "power"}
"""Sections without flags: they are written in files."""
SECRETS = {"broker.password"}
VALUES = [
    "",
    "many",
    "1e999",
    "-1",
    -1,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    [],
    [1],
    {},
    {"a": 1},
    date(2026, 1, 1),
]

# A sentence of ours; pydantic's begin with "Input should", "Value error" or a type's name.
OURS = re.compile(
    r"The setting '.+'( = .{1,70})?( \((flag --[\w-]+|argument)\))? cannot be used: "
    r"(it must be .+|it is required|there is no such field|.+ is not a valid name: use .+|"
    r"a (certificate|key) without .+; set it too)\.",
    re.DOTALL,
)


def nested(field: SettingField, value: object) -> dict[str, Any]:
    for name in reversed(field.path):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def check(model: type[Settings], field: SettingField, value: object) -> None:
    try:
        load_settings(model, config=None, flags=nested(field, value), by_program=True, environment={})
    except SettingsError as error:
        lines = re.split(r"\n(?=The setting ')", str(error))
        assert len(lines) == 1 or field.kind == SECTIONS
        for line in lines:
            assert OURS.fullmatch(line), line
            assert f"'{field.name}" in line


@pytest.mark.parametrize(("model", "field"), EVERY)
def test_it_says_what_it_is(model: type[Settings], field: SettingField) -> None:
    assert field.variable.startswith(model.variable_prefix)
    assert re.fullmatch(r"[A-Z].*\.", field.meaning), "sentences"
    assert field.meaning.count(". ") <= 2, "at most three sentences"
    for ending, unit in {"_s": "seconds", "_bytes": "bytes", "_days": "days"}.items():
        assert not field.name.endswith(ending) or field.name.endswith("_per_s") or field.unit == unit
    assert (field.flag is None) == (field.name in SECRETS or field.path[0] in IN_A_FILE)
    assert field.shown == (field.name not in SECRETS | {"db"})


@pytest.mark.parametrize("model", PROGRAMS)
def test_no_two_have_the_same_flag(model: type[Settings]) -> None:
    flags = [field.flag for field in fields_of(model) if field.flag]
    assert len(flags) == len(set(flags))
    assert not {"--config", "--help", "--json"} & set(flags)


@pytest.mark.parametrize(("model", "field"), EVERY)
def test_a_value_of_a_wrong_kind_is_one_plain_sentence(model: type[Settings], field: SettingField) -> None:
    for value in VALUES:
        check(model, field, value)


@given(
    which=st.sampled_from([(model, field) for model in PROGRAMS for field in fields_of(model)]),
    value=st.recursive(
        st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_any_value_is_taken_or_refused_in_a_sentence(which: tuple[type[Settings], SettingField], value: object) -> None:
    check(*which, value)


@pytest.mark.parametrize("model", PROGRAMS)
def test_the_defaults_are_values_that_may_be_written(model: type[Settings]) -> None:
    written: dict[str, Any] = {}
    for field in fields_of(model):
        if field.default:
            here = written
            for name in field.path[:-1]:
                here = here.setdefault(name, {})
            here[field.path[-1]] = field.default
    assert load_settings(model, config=None, flags=written, environment={}) == model()
