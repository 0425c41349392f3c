import tracemalloc

import cbor2
import pytest
from hypothesis import example, given, settings, strategies as st

from schemas.cbor import MAX_ITEMS, load, pack_counts, pack_ids, pack_probabilities
from schemas.errors import CodecError, MalformedMessage, MessageTooLarge

KILOBYTE = 1024
FILLING = b"\x01" * 900
HUGE = b"\x00\x00\x7f\xff\xff\xff\xff\xff"

HOSTILE = {
    "nothing": b"",
    "a byte string of 128 TB": b"\x5b" + HUGE + FILLING,
    "a byte string of 2 GB": b"\x5a\x7f\xff\xff\xff" + FILLING,
    "a text of 2 GB": b"\x7a\x7f\xff\xff\xff" + FILLING,
    "an array of 128 T items": b"\x9b" + HUGE + FILLING,
    "an array of 900 items": b"\x99\x03\x84" + FILLING,
    "a map of 2 G pairs": b"\xba\x7f\xff\xff\xff" + FILLING,
    "a typed array of 2 GB": b"\xd8\x45\x5a\x7f\xff\xff\xff" + FILLING,
    "seven nested arrays": b"\x81" * 7 + b"\x01",
    "a thousand nested arrays": b"\x81" * 1000 + b"\x01",
    "a thousand nested maps": b"\xa1\x61a" * 333 + b"\x01",
    "a thousand nested tags": b"\xd8\x45" * 500 + b"\x40",
    "an array of indefinite length": b"\x9f\x01\xff",
    "a map of indefinite length": b"\xbf\x61a\x01\xff",
    "bytes of indefinite length": b"\x5f\x41a\xff",
    "a text of indefinite length": b"\x7f\x61a\xff",
    "a break alone": b"\xff",
    "a reserved length": b"\x1c",
    "a key twice": b"\xa2\x61a\x01\x61a\x02",
    "a long key twice": b"\xa2" + (b"\x79\x01\x90" + b"a" * 400 + b"\x01") * 2,
    "a key that is a list": b"\xa1\x80\x01",
    "a key that is a number": b"\xa1\x01\x01",
    "bytes after the end": b"\x01\x01",
    "a date": b"\xc0\x74" + b"2013-03-21T20:04:00Z",
    "a timestamp": b"\xc1\x01",
    "a big number": b"\xc2\x41\x05",
    "a decimal fraction": b"\xc4\x82\x1b\x7f\xff\xff\xff\xff\xff\xff\xff\x01",
    "a rational": b"\xd8\x1e\x82\x01\x02",
    "a regular expression": b"\xd8\x23\x64(a+)",
    "a shared value": b"\xd8\x1c\x81\xd8\x1d\x00",
    "string references": b"\xd9\x01\x00\x82\x61a\xd8\x19\x00",
    "a set": b"\xd9\x01\x02\x82\x01\x02",
    "a self-described message": b"\xd9\xd9\xf7\x01",
    "an unknown tag": b"\xd9\x03\xe7\x01",
    "undefined": b"\xf7",
    "a simple value": b"\xf8\xff",
    "a typed array of text": b"\xd8\x45\x62ab",
    "a typed array within another": b"\xd8\x45\xd8\x45\x42aa",
    "half an item in a typed array": b"\xd8\x45\x43aaa",
    "a text that is not UTF-8": b"\x62\xff\xfe",
    "bytes cut off": b"\x45abc",
    "an argument cut off": b"\x19\x01",
    "a tag without contents": b"\xd8\x45",
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused_at_little_cost(payload: bytes) -> None:
    assert len(payload) <= KILOBYTE
    peaks = []
    for _ in range(3):  # threads that other tests have left may allocate as well
        tracemalloc.start()
        try:
            with pytest.raises(MalformedMessage) as caught:
                load(payload, bound=KILOBYTE)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    # The decoder's read buffer is 64 KiB; nothing may grow with what the payload claims.
    assert min(peaks) < 128 * KILOBYTE
    assert len(str(caught.value)) < 400


def test_a_message_above_its_bound_is_not_looked_at() -> None:
    with pytest.raises(MessageTooLarge) as caught:
        load(b"\x80" * 11, bound=10)
    assert (caught.value.size, caught.value.bound) == (11, 10)
    assert load(b"\x80", bound=1) == []


def test_the_number_of_items_is_bounded_so_that_a_megabyte_of_empty_lists_costs_nothing() -> None:
    assert load(cbor2.dumps([0] * (MAX_ITEMS - 1)), bound=KILOBYTE) == [0] * (MAX_ITEMS - 1)
    with pytest.raises(MalformedMessage, match="items"):
        load(cbor2.dumps([0] * MAX_ITEMS), bound=KILOBYTE)
    payload = b"\x9a\x00\x0f\x00\x00" + b"\x80" * 0xF0000
    tracemalloc.start()
    try:
        with pytest.raises(MalformedMessage, match="items"):
            load(payload, bound=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 64 * KILOBYTE
    finally:
        tracemalloc.stop()


def test_a_typed_array_holds_no_more_than_a_packet_of_p() -> None:
    within, above = (cbor2.dumps(cbor2.CBORTag(69, b"\x00\x00" * number)) for number in (1 << 18, (1 << 18) + 1))
    assert load(within, bound=1 << 20) == [0] * (1 << 18)
    with pytest.raises(MalformedMessage):
        load(above, bound=1 << 20)


@pytest.mark.parametrize("ids", [(), (0,), (65535, 1), (65536,), (2097151, 0)])
def test_ids_take_two_bytes_each_or_four_where_one_needs_them(ids: tuple[int, ...]) -> None:
    packed = pack_ids(ids)
    assert load(cbor2.dumps(packed), bound=KILOBYTE) == list(ids)
    assert len(packed.value) == len(ids) * (4 if max(ids, default=0) > 65535 else 2)


def test_counts_travel_one_less_so_that_certainty_fits() -> None:
    assert load(cbor2.dumps(pack_counts((1, 65536))), bound=KILOBYTE) == [0, 65535]


def test_probabilities_travel_as_float32() -> None:
    assert load(cbor2.dumps(pack_probabilities((0.5, 0.1))), bound=KILOBYTE) == [0.5, pytest.approx(0.1, rel=1e-7)]


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=5) | st.binary(max_size=5)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_the_walk_over_the_heads_agrees_with_the_decoder(value: object) -> None:
    payload = cbor2.dumps(value)
    try:
        assert load(payload, bound=1 << 16) == value
    except MalformedMessage as error:
        assert "nested" in str(error)  # noqa: PT017 - deep values are refused, all others come back


@given(st.binary(max_size=64))
@example(b"\xd8\x55\x44\x00\x00\xc0\x7f")  # NaN in a typed array: the fields' own bounds catch it
@settings(max_examples=500, deadline=None)
def test_random_bytes_raise_nothing_but_the_codecs_own_error(payload: bytes) -> None:
    try:
        load(payload, bound=KILOBYTE)
    except CodecError:
        return
