import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.vocabulary import Vocabulary

TOKENS = st.lists(st.text(max_size=4), min_size=2, max_size=8)


@given(TOKENS, TOKENS)
def test_vocabularies_are_equal_iff_their_tokens_are(one: list[str], two: list[str]) -> None:
    assert (Vocabulary.of(one) == Vocabulary.of(two)) == (one == two)


def test_token_boundaries_change_the_fingerprint() -> None:
    assert Vocabulary.of(["ab", "c"]) != Vocabulary.of(["a", "bc"])
    assert Vocabulary.of(["", "ab"]) != Vocabulary.of(["ab", ""])


def test_the_fingerprint_does_not_change_between_releases() -> None:
    """Devices and edges of different releases compare it."""
    assert Vocabulary.of(["a", "ü"]).fingerprint.hex() == (
        "52250a23d4756306a0a38e8476552a84588f5578ef4ac8e72b9b07f3f8e49ffe"
    )


def test_tokens_that_are_no_unicode_have_a_fingerprint() -> None:
    assert Vocabulary.of(["\ud800", "b"]) != Vocabulary.of(["\ud801", "b"])


@pytest.mark.parametrize("size", [0, 1, True, 2.0, (1 << 21) + 1])
def test_an_impossible_size_is_refused(size: object) -> None:
    with pytest.raises(ValidationError):
        Vocabulary.model_validate({"size": size, "fingerprint": bytes(32)})


def test_it_reads_as_size_and_head_of_the_fingerprint() -> None:
    assert str(Vocabulary(size=7, fingerprint=bytes(range(32)))) == "7 tokens, 00010203"
