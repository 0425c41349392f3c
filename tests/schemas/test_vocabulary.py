import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError

from schemas.vocabulary import EMPTY_DIGEST, Vocabulary, extend_digest, token_strings

TOKENS = st.lists(st.text(max_size=4), min_size=2, max_size=8)


@given(TOKENS, TOKENS)
def test_vocabularies_are_equal_iff_their_tokens_are(one: list[str], two: list[str]) -> None:
    assert (Vocabulary.of(one) == Vocabulary.of(two)) == (one == two)


def test_token_boundaries_change_the_fingerprint() -> None:
    assert Vocabulary.of(["ab", "c"]) != Vocabulary.of(["a", "bc"])
    assert Vocabulary.of(["", "ab"]) != Vocabulary.of(["ab", ""])


@pytest.mark.parametrize("size", [0, 1, True, 2.0, (1 << 21) + 1])
def test_an_impossible_size_is_refused(size: object) -> None:
    with pytest.raises(ValidationError):
        Vocabulary.model_validate({"size": size, "fingerprint": bytes(32)})


PLAIN = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("rows", "tokens"),
    [
        ([], []),
        (PLAIN, PLAIN),
        ([*PLAIN, "[PAD3]", "[PAD4]"], PLAIN),
        ([*PLAIN, "[PAD1]", "[PAD2]"], PLAIN),
        ([*PLAIN, "[PAD250001]"], PLAIN),
        (["[PAD0]", "[PAD1]"], []),
    ],
    ids=["no row", "no padding", "named by id", "named from one on", "named by anything", "nothing but padding"],
)
def test_padding_at_the_end_is_left_out(rows: list[str], tokens: list[str]) -> None:
    assert token_strings(rows) == tokens


@pytest.mark.parametrize(
    "last",
    [
        "<unused6241>", "<|reserved_special_token_250|>", "[unused99]", "<pad>", "[PAD]", "[PAD3", "PAD3", "[PAD-3]",
        "[PAD3]\u2581", "[PAD3]\n", "[pad3]", "[PAD\u0663]", "\u2581", "\u2581\u2581", "<0xFF>",
    ],
)  # fmt: skip
def test_whatever_else_stands_at_the_end_is_a_token(last: str) -> None:
    assert token_strings([*PLAIN, last]) == [*PLAIN, last]


def test_padding_between_tokens_stays_so_that_ids_do() -> None:
    assert token_strings(["a", "[PAD1]", "c", "[PAD3]"]) == ["a", "[PAD1]", "c"]


def test_strings_are_those_that_llama_cpp_reads() -> None:
    assert token_strings(["a", "", "c\0d", "\0", ""]) == ["a", "[EMPTY_1]", "c", "[EMPTY_3]", "[EMPTY_4]"]


def test_a_space_has_one_spelling_whatever_the_converter_wrote() -> None:
    assert token_strings(["\u2581a", "  ", "<a b>"]) == token_strings(["\u2581a", "\u2581\u2581", "<a\u2581b>"])


@given(st.lists(st.sampled_from(["a", "", "\0", "b\0", "[PAD1]", "[PAD7]", "[EMPTY_2]", "<unused1>"])))
def test_a_second_reading_changes_nothing(rows: list[str]) -> None:
    once = token_strings(rows)
    assert token_strings(once) == once
    assert len(once) <= len(rows)


TEXT = st.lists(st.integers(0, (1 << 21) - 1), max_size=20)


@given(TEXT, TEXT)
def test_a_digest_is_extended_piece_by_piece(head: list[int], tail: list[int]) -> None:
    assert extend_digest(extend_digest(EMPTY_DIGEST, head), tail) == extend_digest(EMPTY_DIGEST, head + tail)
    assert 0 <= extend_digest(EMPTY_DIGEST, head) < 1 << 32


@given(TEXT.filter(bool), st.data())
def test_another_token_or_another_order_gives_another_digest(text: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text) - 1))
    changed = [*text[:at], text[at] ^ 1, *text[at + 1 :]]
    assert extend_digest(EMPTY_DIGEST, changed) != extend_digest(EMPTY_DIGEST, text)
    if text[0] != text[-1]:
        assert extend_digest(EMPTY_DIGEST, [text[-1], *text[1:-1], text[0]]) != extend_digest(EMPTY_DIGEST, text)
