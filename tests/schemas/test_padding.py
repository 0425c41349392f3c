import cbor2
import pytest
from hypothesis import given, strategies as st

from schemas.cbor import load
from schemas.codec import (
    MAX_DRAFT_BYTES,
    decode_draft,
    decode_verdict,
    encode_draft,
    encode_verdict,
    pad,
)
from schemas.messages import Draft, Verdict
from tests.schemas.strategies import drafts, verdicts

BUCKETS = st.integers(1, 1024)
AROUND_HEADS = [*range(1, 40), *range(250, 270), *range(65_530, 65_550), 100_000]


@pytest.mark.parametrize("fields", [[1, 2, 3], list(range(20)), [b"x" * 300, None]], ids=["few", "many", "long"])
def test_any_size_can_be_had_and_every_head_is_the_shortest(fields: list[object]) -> None:
    plain = cbor2.dumps(fields)
    for more in AROUND_HEADS:
        padded = pad(plain, bucket=len(plain) + more, most=1 << 20)
        assert len(padded) == len(plain) + more
        read = load(padded, bound=1 << 20)
        assert isinstance(read, list)
        assert read[: len(fields)] == fields
        assert cbor2.dumps(read) == padded


def test_without_a_bucket_or_where_the_size_is_right_nothing_is_added() -> None:
    plain = cbor2.dumps([1, b"x" * 60])
    assert len(plain) == 64
    assert pad(plain, bucket=0, most=1000) == plain
    assert pad(plain, bucket=32, most=1000) == plain


@pytest.mark.parametrize("most", [60, 64, 100, 127])
def test_no_message_is_filled_beyond_what_it_may_have(most: int) -> None:
    plain = cbor2.dumps([1, b"x" * 60])
    assert len(pad(plain, bucket=128, most=most)) == max(most, len(plain))


@given(drafts(), BUCKETS)
def test_a_padded_draft_is_the_same_draft(draft: Draft, bucket: int) -> None:
    plain, padded = encode_draft(draft), encode_draft(draft, padding=bucket)
    assert decode_draft(padded) == draft
    assert len(padded) % bucket == 0 or len(padded) == MAX_DRAFT_BYTES
    assert len(padded) < len(plain) + 1 + bucket  # `tried` may have to be spelt out


@given(verdicts(), BUCKETS)
def test_a_padded_verdict_is_the_same_verdict(verdict: Verdict, bucket: int) -> None:
    plain, padded = encode_verdict(verdict), encode_verdict(verdict, padding=bucket)
    assert decode_verdict(padded) == verdict
    assert len(padded) % bucket == 0
    assert len(padded) < len(plain) + bucket
