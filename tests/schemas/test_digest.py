from hypothesis import given
from hypothesis import strategies as st

from schemas.digest import EMPTY, extend_digest

TEXT = st.lists(st.integers(0, (1 << 21) - 1), max_size=20)


@given(TEXT, TEXT)
def test_a_digest_is_extended_piece_by_piece(head: list[int], tail: list[int]) -> None:
    assert extend_digest(extend_digest(EMPTY, head), tail) == extend_digest(EMPTY, head + tail)
    assert 0 <= extend_digest(EMPTY, head) < 1 << 32


@given(TEXT.filter(bool), st.data())
def test_another_token_or_another_order_gives_another_digest(text: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text) - 1))
    changed = [*text[:at], text[at] ^ 1, *text[at + 1 :]]
    assert extend_digest(EMPTY, changed) != extend_digest(EMPTY, text)
    if text[0] != text[-1]:
        assert extend_digest(EMPTY, [text[-1], *text[1:-1], text[0]]) != extend_digest(EMPTY, text)


def test_it_is_the_checksum_that_other_implementations_compute() -> None:
    """CRC-32 of the ids as 32-bit little-endian words: 01000000 02000000 70110100."""
    assert extend_digest(EMPTY, [1, 2, 70000]) == 3449148903
