import pytest

from schemas.errors import InvalidName, SchemaError
from schemas.names import MAX_NAME_LENGTH, check_name, model_name


@pytest.mark.parametrize("name", ["a", "A1", "edge-1", "pi.local", "a_b", "0", "a" * MAX_NAME_LENGTH])
def test_names_of_machines_are_valid(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a ",
        "a\n",
        "-a",
        "a-",
        "_edge",
        "$SYS",
        "a/b",
        "a+b",
        "a#b",
        "a\x00b",
        "é",
        "\uff11",
        "a" * (MAX_NAME_LENGTH + 1),
    ],
    ids=repr,
)
def test_what_a_topic_level_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(InvalidName):
        check_name(name)


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("smollm2", "Q4_0"), "smollm2 Q4_0"),
        (("smollm2-q4_0", "Q4_0"), "smollm2-q4_0"),
        (("Q4_0", "Q4_0"), "Q4_0"),
        (("none", "none"), "none"),
        (("suffix", "none"), "suffix"),
        ((None, None), None),
        (("", ""), None),
    ],
)
def test_a_drafter_without_a_model_is_named_once(parts: tuple[str | None, str | None], name: str | None) -> None:
    assert model_name(*parts) == name


def test_a_long_name_is_not_repeated_in_full() -> None:
    with pytest.raises(SchemaError) as caught:
        check_name("x" * 10_000)
    assert len(str(caught.value)) < 300
