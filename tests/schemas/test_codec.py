import tracemalloc
from collections.abc import Callable
from itertools import product
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings, strategies as st

from fleet_common.mqtt.packets import publish_packet
from schemas.codec import (
    DRAFT_LAYOUT,
    MAX_CLOSE_BYTES,
    MAX_DRAFT_BYTES,
    MAX_OPEN_BYTES,
    MAX_REPLY_BYTES,
    MAX_VERDICT_BYTES,
    VERDICT_LAYOUT,
    decode_close,
    decode_draft,
    decode_open,
    decode_reply,
    decode_verdict,
    encode_close,
    encode_draft,
    encode_open,
    encode_reply,
    encode_verdict,
)
from schemas.downlink import FORMS, Samples, Sparse, UnknownForm
from schemas.errors import CodecError, MalformedMessage, MessageTooLarge
from schemas.fields import MAX_DRAFT, EdgeLoad, Logprobs
from schemas.messages import Draft, Open, Verdict
from schemas.policy import SamplingPolicy
from schemas.reasons import Action, EndReason, FaultCode, Finish, RefusalCode
from schemas.vocabulary import Vocabulary
from tests.schemas.strategies import closes, drafts, opens, replies, verdicts

WORST = (1 << 16) - 1
"""The largest handle, and an upper bound of a realistic session's round, epoch, base and token ids."""

DECODERS: dict[Callable[[bytes], object], int] = {
    decode_draft: MAX_DRAFT_BYTES,
    decode_verdict: MAX_VERDICT_BYTES,
    decode_open: MAX_OPEN_BYTES,
    decode_close: MAX_CLOSE_BYTES,
    decode_reply: MAX_REPLY_BYTES,
}
KINDS: tuple[tuple[st.SearchStrategy[Any], Callable[[Any], bytes], Callable[[bytes], Any]], ...] = (
    (drafts(), encode_draft, decode_draft),
    (verdicts(), encode_verdict, decode_verdict),
    (opens(), encode_open, decode_open),
    (closes(), encode_close, decode_close),
    (replies(), encode_reply, decode_reply),
)
each_kind = pytest.mark.parametrize(
    ("messages", "encode", "decode"), KINDS, ids=["draft", "verdict", "open", "close", "reply"]
)
each_decoder = pytest.mark.parametrize("decode", DECODERS, ids=lambda decode: decode.__name__)


@each_kind
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_encoded_is_decoded(messages: Any, encode: Any, decode: Any, data: st.DataObject) -> None:
    message = data.draw(messages)
    assert decode(encode(message)) == message


@each_kind
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_mutilated_message_raises_nothing_but_the_codecs_own_error(
    messages: Any, encode: Any, decode: Any, data: st.DataObject
) -> None:
    payload = bytearray(encode(data.draw(messages)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload)))
        match data.draw(st.sampled_from(["cut", "change", "insert", "delete"])):
            case "cut":
                del payload[at:]
            case "change" if at < len(payload):
                payload[at] = data.draw(st.integers(0, 255))
            case "delete":
                del payload[at : at + data.draw(st.integers(1, 8))]
            case _:
                payload[at:at] = data.draw(st.binary(max_size=8))
    _decode_or_refuse(decode, bytes(payload))


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=11)
        | st.dictionaries(st.sampled_from(["kind", "session", "policy", "prompt", "code", "reason"]), inner)
    ),
    max_leaves=12,
)


@each_decoder
@given(value=ANYTHING)
@settings(max_examples=200, deadline=None)
def test_random_cbor_raises_nothing_but_the_codecs_own_error(decode: Any, value: object) -> None:
    _decode_or_refuse(decode, cbor2.dumps(value))


def _decode_or_refuse(decode: Callable[[bytes], object], payload: bytes) -> None:
    try:
        decode(payload)
    except CodecError as error:
        # The message goes into a Fault and into the log, so the sender must not choose its length.
        assert len(str(error)) < 400  # noqa: PT017 - not raising is as good


@each_decoder
def test_a_message_above_its_bound_is_refused_unread(decode: Any) -> None:
    with pytest.raises(MessageTooLarge):
        decode(b"\xff" * (DECODERS[decode] + 1))
    with pytest.raises(MalformedMessage):
        decode(b"\xff" * DECODERS[decode])


@pytest.mark.parametrize("size", [1 << 20])
def test_a_megabyte_of_open_costs_a_small_multiple_of_its_bytes(size: int) -> None:
    tokens = cbor2.CBORTag(69, b"\xff" * (size - 200))
    payload = cbor2.dumps({"kind": "open", "prompt": tokens})
    tracemalloc.start()
    try:
        with pytest.raises(MalformedMessage):
            decode_open(payload)
        assert tracemalloc.get_traced_memory()[1] < 4 * size
    finally:
        tracemalloc.stop()


DRAFT = [1, 2, 3, 4, None, cbor2.CBORTag(69, b"\x05\x00"), cbor2.CBORTag(69, b"\x06\x00"), False, 7]
VERDICT = [1, 2, 1, 9, 0, 0.5, 0.5]


def test_the_samples_that_are_spoilt_below_are_sound() -> None:
    assert decode_draft(cbor2.dumps(DRAFT)) == Draft(
        handle=1, round=2, epoch=3, base=4, tokens=(5,), counts=(7,), digest=7
    )
    assert decode_verdict(cbor2.dumps(VERDICT)) == Verdict(
        handle=1, round=2, accepted=1, next=9, queue_ms=0.5, compute_ms=0.5
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *product([0, 1, 2, 3, 4, 8], [True, 1.0, "1", b"1", -1, 1 << 33, [1], float("nan")]),
        *product([6], [[True], [1.0], ["1"], [65536], [-1], [5, 5], cbor2.CBORTag(85, b"\x00\x00\x80\x3f"), 5]),
        *product([7], [0, 1, "yes", None]),
    ],
    ids=repr,
)
def test_a_field_of_a_draft_takes_nothing_of_another_type(field: int, value: object) -> None:
    with pytest.raises(MalformedMessage):
        decode_draft(cbor2.dumps([*DRAFT[:field], value, *DRAFT[field + 1 :]]))


def test_a_draft_longer_than_any_edge_grants_is_refused() -> None:
    longest = Draft(handle=0, round=0, epoch=0, base=0, digest=0, tokens=tuple(range(MAX_DRAFT)))
    assert decode_draft(encode_draft(longest)) == longest
    with pytest.raises(MalformedMessage):
        decode_draft(cbor2.dumps([0, 0, 0, 0, None, cbor2.CBORTag(69, b"\x00" * 2 * (MAX_DRAFT + 1)), None, False, 0]))
    with pytest.raises(MalformedMessage):  # it asks for samples too
        decode_draft(cbor2.dumps([*DRAFT, 16]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *product([0, 1, 2, 4], [True, 1.0, "1", -1, None, 1 << 33]),
        *product([5, 6], [float("nan"), float("inf"), -1.0, True, "1"]),
    ],
    ids=repr,
)
def test_an_integer_of_a_verdict_is_nothing_else_and_a_time_is_finite(field: int, value: object) -> None:
    with pytest.raises(MalformedMessage):
        decode_verdict(cbor2.dumps([*VERDICT[:field], value, *VERDICT[field + 1 :]]))


def floats(*values: bytes) -> cbor2.CBORTag:
    return cbor2.CBORTag(85, b"".join(values))


ONE, HALF, NAN, INFINITE, MINUS = (
    b"\x00\x00\x80\x3f",
    b"\x00\x00\x00\x3f",
    b"\x00\x00\xc0\x7f",
    b"\x00\x00\x80\x7f",
    b"\x00\x00\x80\xbf",
)
IDS_1, IDS_2 = cbor2.CBORTag(69, b"\x01\x00"), cbor2.CBORTag(69, b"\x01\x00\x02\x00")


@pytest.mark.parametrize(
    "following",
    [
        True,
        1.5,
        "sparse",
        {"kind": "sparse", "ids": [1], "probs": [1.0]},
        [],
        [256, IDS_1, floats(ONE)],
        [-1, IDS_1, floats(ONE)],
        [True, IDS_1, floats(ONE)],
        [1.0, IDS_1, floats(ONE)],
        [1, IDS_1],
        [1, IDS_1, floats(HALF)],
        [1, IDS_1, floats(NAN)],
        [1, IDS_1, floats(INFINITE)],
        [1, IDS_2, floats(ONE)],
        [1, IDS_2, floats(ONE, MINUS)],
        [1, cbor2.CBORTag(69, b"\x01\x00\x01\x00"), floats(HALF, HALF)],
        [1, floats(ONE), floats(ONE)],
        [1, cbor2.CBORTag(70, b"\x00\x00\x20\x00"), floats(ONE)],
        [2, True, IDS_1, floats(ONE)],
        [2, 0, IDS_1, floats(NAN)],
        [2, 0, IDS_2, floats(ONE)],
        [2, -1, IDS_1, floats(ONE)],
        [2, 0, cbor2.CBORTag(69, b""), floats()],
        [3, floats(ONE, ONE)],
        [3, "text"],
        [3, ONE],
        [3, ONE + b"\x00"],
        [3, HALF + HALF + HALF],
        [3, NAN + ONE],
        [3, INFINITE + ONE],
        [3, MINUS + ONE + ONE],
    ],
    ids=repr,
)
def test_what_is_no_form_of_p_is_refused(following: object) -> None:
    with pytest.raises(MalformedMessage):
        decode_verdict(cbor2.dumps([1, 2, 1, following, 0, 0.5, 0.5]))


# What a newer release may send. What it adds to a whole session: tests/fleet_edge/test_neighbouring_releases.py.


@pytest.mark.parametrize("number", [0, max(form.number for form in FORMS) + 1, 255])
@pytest.mark.parametrize("behind", [(), (5,), (IDS_1, floats(ONE)), ({"new": [1]},)], ids=repr)
def test_a_form_of_p_that_is_unknown_is_known_by_its_number(number: int, behind: tuple[object, ...]) -> None:
    verdict = decode_verdict(cbor2.dumps([1, 2, 1, [number, *behind], 0, 0.5, 0.5]))
    assert verdict.next == UnknownForm(number)
    with pytest.raises(ValueError, match="unknown form"):
        encode_verdict(verdict)


@pytest.mark.parametrize("number", [3, 255])
def test_an_unknown_finish_ends_the_text_without_calling_it_complete(number: int) -> None:
    assert decode_verdict(cbor2.dumps([*VERDICT[:4], number, *VERDICT[5:]])).finish is Finish.LENGTH


@pytest.mark.parametrize("number", [256, -1, True, False, 1.0, "stop"], ids=repr)
def test_what_is_no_number_of_a_finish_is_refused(number: object) -> None:
    with pytest.raises(MalformedMessage, match="finish"):
        decode_verdict(cbor2.dumps([*VERDICT[:4], number, *VERDICT[5:]]))


SESSION = b"12345678"
COUNTS = dict.fromkeys(("digest", "drafted", "tested", "accepted", "rounds", "uplink_bytes", "downlink_bytes"), 1)
TIMES = dict.fromkeys(("draft_ms", "wait_ms", "wall_ms"), 1.0)
REFUSED = {"kind": "refused", "session": SESSION, "code": "busy", "sentence": "later"}
FAULT = {"kind": "fault", "code": "tokens-differ", "action": "resume", "sentence": "again"}
CLOSED = {"kind": "closed", "session": SESSION, "reason": "stop", "tokens": 1, "rounds": 1}
CLOSED |= {"mean_batch": 1.0, "queue_ms": 1.0, "compute_ms": 1.0}
CLOSE = {"kind": "close", "session": SESSION, "handle": 1, "reason": "stop", "tokens": 1, **COUNTS, **TIMES}
WORDS: tuple[tuple[Callable[[bytes], Any], dict[str, object], str, object], ...] = (
    (decode_reply, REFUSED, "code", RefusalCode.OTHER),
    (decode_reply, FAULT, "code", FaultCode.OTHER),
    (decode_reply, FAULT, "action", Action.GIVE_UP),
    (decode_reply, CLOSED, "reason", EndReason.FAILED),
    (decode_close, CLOSE, "reason", EndReason.FAILED),
)
each_word = pytest.mark.parametrize(
    ("decode", "fields", "field", "reading"), WORDS, ids=[f"{fields['kind']}-{field}" for _, fields, field, _ in WORDS]
)


@each_word
@pytest.mark.parametrize("word", ["overloaded", "x", "a-2nd-reason", "r" * 40])
def test_an_unknown_word_is_read_as_the_one_that_promises_least(
    decode: Any, fields: Any, field: str, reading: object, word: str
) -> None:
    plain, read = decode(cbor2.dumps(fields)), decode(cbor2.dumps(fields | {field: word}))
    assert getattr(plain, field).value == fields[field]
    assert getattr(read, field) is reading
    assert read == plain.model_copy(update={field: reading})


@each_word
@pytest.mark.parametrize(
    "word", ["", "Busy", "two words", "-busy", "a\n", "é", "r" * 41, b"busy", 1, None, ["x"]], ids=repr
)
def test_what_is_no_word_is_refused(decode: Any, fields: Any, field: str, reading: object, word: object) -> None:  # noqa: ARG001
    with pytest.raises(MalformedMessage, match=field):
        decode(cbor2.dumps(fields | {field: word}))


def open_fields(**other: object) -> dict[str, Any]:
    message = Open(
        session=SESSION,
        vocabulary=Vocabulary.of(["a", "b"]),
        draft_model="toy",
        quantization="none",
        policy=SamplingPolicy(seed=1),
        prompt=(1,),
        max_new_tokens=5,
    )
    return {**cbor2.loads(encode_open(message)), **other}


@pytest.mark.parametrize(("name", "value"), [("top_a", 0.1), ("mode", "lookahead")])
def test_what_is_unknown_of_a_policy_is_named_and_not_passed_over(name: str, value: object) -> None:
    """Without it, the output would follow another distribution than the requested one."""
    fields = open_fields()
    assert decode_open(cbor2.dumps(fields)).policy == SamplingPolicy(seed=1)
    with pytest.raises(MalformedMessage, match=rf"policy\.{name}"):
        decode_open(cbor2.dumps(fields | {"policy": fields["policy"] | {name: value}}))


def test_of_a_hundred_thousand_wrong_tokens_one_is_told() -> None:
    """Describing each of them took 200 ms on the link's thread."""
    wrong = cbor2.CBORTag(70, b"\xff\xff\xff\xff" * 131_000)
    fields = open_fields(prompt=wrong)
    with pytest.raises(MalformedMessage) as raised:
        decode_open(cbor2.dumps(fields))
    assert raised.value.__cause__.error_count() == 1  # type: ignore[union-attr]
    assert "prompt.0" in str(raised.value)


@pytest.mark.parametrize(
    ("decode", "fields"),
    [
        (decode_open, lambda word: open_fields(policy={word: 1})),
        (decode_reply, lambda word: {"kind": word}),
    ],
)
def test_what_a_sentence_quotes_begins_no_line_and_steers_no_terminal(decode: Any, fields: Any) -> None:
    with pytest.raises(MalformedMessage) as raised:
        decode(cbor2.dumps(fields("top\n2026 WARNING all is well\x1b[2J\u2028")))
    assert str(raised.value).isprintable()
    assert "WARNING" in str(raised.value)


def test_an_open_of_a_later_protocol_is_told_so_whatever_it_looks_like() -> None:
    assert decode_open(cbor2.dumps(open_fields(protocol=2))).protocol == 2  # readable: refused with its session's name
    for other in ({"prompt": "text"}, {"session": "abc"}):
        with pytest.raises(MalformedMessage, match="protocol"):
            decode_open(cbor2.dumps(open_fields(protocol=2, **other)))
    for protocol in (0, 1, True, 1 << 16, "2"):
        with pytest.raises(MalformedMessage, match="invalid at"):
            decode_open(cbor2.dumps(open_fields(protocol=protocol, prompt="text")))


@pytest.mark.parametrize(
    "payload", [{"kind": "x" * 2000}, {"kind": "open"}, {}, {"kind": 1}, [], 5], ids=lambda v: repr(v)[:20]
)
def test_a_reply_of_no_known_kind_is_refused_in_a_short_sentence(payload: object) -> None:
    with pytest.raises(MalformedMessage) as caught:
        decode_reply(cbor2.dumps(payload))
    assert len(str(caught.value)) < 400


def test_times_are_rounded_to_three_digits_and_capped() -> None:
    sent = Verdict(handle=0, round=0, accepted=0, queue_ms=12.3456, compute_ms=1e6)
    received = decode_verdict(encode_verdict(sent))
    assert received.queue_ms == pytest.approx(12.3456, rel=1e-3)
    assert received.compute_ms == 65504.0


# Byte budgets, for the largest field values that a realistic session reaches.


def worst_draft(*, residual: bool) -> Draft:
    return Draft(
        handle=WORST,
        round=WORST,
        epoch=WORST,
        base=WORST,
        fix=WORST,
        tokens=(WORST,) * 5,
        counts=(1 << 16,) * 5 if residual else None,
        more=True,
        digest=(1 << 32) - 1,
    )


def worst_verdict(following: int | Sparse | Samples, *, finish: Finish = Finish.NO) -> Verdict:
    return Verdict(
        handle=WORST, round=WORST, accepted=MAX_DRAFT, next=following, finish=finish, queue_ms=9876.5, compute_ms=0.0123
    )


def test_a_draft_of_five_tokens_fits_into_48_bytes_and_36_in_coupled_mode() -> None:
    assert len(encode_draft(worst_draft(residual=True))) <= 48
    assert len(encode_draft(worst_draft(residual=False))) <= 36


def test_a_verdict_in_coupled_mode_fits_into_20_bytes() -> None:
    assert len(encode_verdict(worst_verdict(WORST))) <= 20
    assert len(encode_verdict(worst_verdict(WORST, finish=Finish.STOP))) <= 20


@pytest.mark.parametrize("support", [1, 2, 10, 50])
def test_a_rejection_at_the_default_policy_takes_six_bytes_a_token_and_at_most_32(support: int) -> None:
    ids = tuple(range(WORST, WORST - support, -1))
    verdict = worst_verdict(Sparse(ids=ids, probs=(1.0 / support,) * support))
    assert len(encode_verdict(verdict)) <= 6 * support + 32


def test_the_first_samples_take_six_bytes_each_and_at_most_36() -> None:
    verdict = worst_verdict(Samples(start=0, ids=(WORST,) * 16, probs=(0.1,) * 16))
    assert len(encode_verdict(verdict)) <= 6 * 16 + 36


def test_a_draft_of_five_tokens_fits_into_a_packet_of_64_bytes() -> None:
    """At QoS 1, with a known topic alias and an expiry."""
    payload = encode_draft(worst_draft(residual=True))
    assert len(publish_packet("", payload, identifier=WORST, expiry_s=30, alias=1)) <= 64


TOLD = Logprobs(own=(-0.5,), ids=(4, 5), values=(-0.5, -1.5))


def test_the_layouts_are_those_of_the_encoded_arrays() -> None:
    draft = Draft(handle=1, round=2, epoch=3, base=4, fix=5, tokens=(), counts=(), more=True, digest=6)
    array = cbor2.loads(encode_draft(draft))
    shown = dict(zip(DRAFT_LAYOUT, array, strict=False))
    for field in ("handle", "round", "epoch", "base", "fix", "more", "digest"):
        assert shown[field] == getattr(draft, field)
    asking = Draft(handle=1, round=2, epoch=3, base=4, digest=6, tried=7)
    assert dict(zip(DRAFT_LAYOUT, cbor2.loads(encode_draft(asking)), strict=False))["tried"] == 7
    asking = Draft(handle=1, round=2, epoch=3, base=4, digest=6, write=8)
    assert dict(zip(DRAFT_LAYOUT, cbor2.loads(encode_draft(asking)), strict=True))["write"] == 8
    verdict = Verdict(handle=1, round=2, accepted=3, next=9, finish=Finish.LENGTH, queue_ms=0.5, compute_ms=0.25)
    there = verdict.model_dump(exclude_none=True)
    assert dict(zip(VERDICT_LAYOUT, cbor2.loads(encode_verdict(verdict)), strict=False)) == there
    written = Verdict(
        handle=1,
        round=2,
        accepted=0,
        base=3,
        written=(4,),
        load=EdgeLoad(requests=7, writing_ms=12.0),
        chained=8,
        logprobs=TOLD,
        prompt=TOLD,
    )
    assert dict(zip(VERDICT_LAYOUT, cbor2.loads(encode_verdict(written)), strict=True))["base"] == 3
