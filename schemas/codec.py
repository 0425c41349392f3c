"""Binary codec: session messages to CBOR and back.

The two hot messages are arrays, keyed by position; the others are maps. A decoder raises nothing but `CodecError`, for
any input, and coerces nothing: an integer is an integer, neither `true` nor `1.0`. Unknown keys of a map and fields
after an array's last are of a newer release and ignored; unknown values are read as `schemas.reasons` says.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Final, TypeVar

import cbor2
import numpy as np
from pydantic import BaseModel, TypeAdapter, ValidationError

from schemas.cbor import load, pack_counts, pack_ids, pack_probabilities
from schemas.downlink import DownlinkForm, UnknownForm, pack_form, unpack_form
from schemas.errors import MalformedMessage
from schemas.fields import EdgeLoad, Logprobs
from schemas.messages import PROTOCOL, Close, Draft, Open, Opened, SessionReply, Verdict
from schemas.policy import ADJUSTMENTS, SamplingPolicy

_NULL: Final = b"\xf6"
_MAX_FIELDS: Final = 23  # of an array with a one-byte head
_ARRAY, _BYTES = 0x80, 0x40  # major types
# Heads of byte strings: argument of the first byte (0: the length itself), bytes of the length, largest and smallest
# length.
_HEADS: Final = ((26, 4, 0xFFFF_FFFF, 0x10000), (25, 2, 0xFFFF, 0x100), (24, 1, 0xFF, 24), (0, 0, 23, 0))


def pad(payload: bytes, *, bucket: int, most: int) -> bytes:
    """Pad a CBOR array of at most 20 fields to a multiple of `bucket` bytes (0: none), at most `most`."""
    if bucket == 0:
        return payload
    left = min(-(-len(payload) // bucket) * bucket, most) - len(payload)
    if left <= 0:
        return payload
    filling, nulls = _byte_string(left)
    fields = payload[0] - _ARRAY + 1 + nulls
    assert fields <= _MAX_FIELDS
    return bytes([_ARRAY | fields]) + payload[1:] + filling + _NULL * nulls


def _byte_string(size: int) -> tuple[bytes, int]:
    """Return the longest byte string of at most `size` bytes, including its head, and the number of remaining bytes.

    Its length has the shortest encoding, so some sizes are impossible.
    """
    first, width, most = next(head for head in _HEADS if head[1] + head[3] < size)[:3]
    length = min(size - 1 - width, most)
    head = bytes([_BYTES | (first or length)]) + (length.to_bytes(width, "big") if width else b"")
    return head + bytes(length), size - len(head) - length


MAX_DRAFT_BYTES: Final = 1024
MAX_CLOSE_BYTES: Final = 1024
MAX_REPLY_BYTES: Final = 16 << 10
MAX_OPEN_BYTES: Final = 1 << 20
MAX_VERDICT_BYTES: Final = 1 << 20

DRAFT_LAYOUT: Final = (
    "handle", "round", "epoch", "base", "fix", "tokens", "counts", "more", "digest", "tried", "write",
)  # fmt: skip
VERDICT_LAYOUT: Final = (
    "handle", "round", "accepted", "next", "finish", "queue_ms", "compute_ms", "base", "written", "load", "chained",
    "logprobs", "prompt",
)  # fmt: skip
"""Fields of the arrays, in order."""

DRAFT_FIELDS: Final = 9
VERDICT_FIELDS: Final = 7
"""Fields that each array has; those behind them are optional."""

_LOGPROBS_FIELDS = 3
_LOAD_FIELDS = 7

M = TypeVar("M", bound=BaseModel)
_REPLY: TypeAdapter[SessionReply] = TypeAdapter(SessionReply)


def encode_draft(draft: Draft, *, padding: int = 0) -> bytes:
    """Return the array [handle, round, epoch, base, fix, tokens, counts, more, digest(, tried(, write(, padding)))]."""
    fields: list[object] = [
        draft.handle,
        draft.round,
        draft.epoch,
        draft.base,
        draft.fix,
        pack_ids(draft.tokens),
        None if draft.counts is None else pack_counts(draft.counts),
        draft.more,
        draft.digest,
    ]
    if draft.tried is not None or draft.write is not None or padding:
        fields.append(draft.tried)
    if draft.write is not None:
        fields.append(draft.write)
    return pad(cbor2.dumps(fields), bucket=padding, most=MAX_DRAFT_BYTES)


def decode_draft(payload: bytes) -> Draft:
    """Read a draft of at most `MAX_DRAFT_BYTES`; raise MessageTooLarge or MalformedMessage."""
    fields = _array(payload, DRAFT_LAYOUT, bound=MAX_DRAFT_BYTES, least=DRAFT_FIELDS)
    return _validated(Draft, fields | {"counts": _counts(fields["counts"])})


def encode_verdict(verdict: Verdict, *, padding: int = 0, most: int = MAX_VERDICT_BYTES) -> bytes:
    """Return a verdict's array.

    [handle, round, accepted, next, finish, queue_ms, compute_ms(, base, written(, load(, chained(, logprobs(,
    prompt)))))].
    """
    fields = [
        verdict.handle,
        verdict.round,
        verdict.accepted,
        _pack_next(verdict.next),
        int(verdict.finish),
        _half(verdict.queue_ms),
        _half(verdict.compute_ms),
    ]
    written = None if verdict.written is None else pack_ids(verdict.written)
    logprobs = (_pack_logprobs(each) for each in (verdict.logprobs, verdict.prompt))
    optional = [verdict.base, written, _pack_load(verdict.load), verdict.chained, *logprobs]
    while optional and optional[-1] is None:
        optional.pop()
    fields += optional
    plain = cbor2.dumps(fields, canonical=True)  # shortest encoding of floats
    return pad(plain, bucket=padding, most=most)


def decode_verdict(payload: bytes) -> Verdict:
    """Read a verdict of at most `MAX_VERDICT_BYTES`; raise MessageTooLarge or MalformedMessage."""
    fields = _array(payload, VERDICT_LAYOUT, bound=MAX_VERDICT_BYTES, least=VERDICT_FIELDS)
    unpacked = {
        "next": _unpack_next(fields["next"]),
        "load": _unpack_load(fields["load"]),
        "logprobs": _unpack_logprobs(fields["logprobs"]),
        "prompt": _unpack_logprobs(fields["prompt"]),
    }
    return _validated(Verdict, fields | unpacked)


OMITTED: Final = ("min_p", *ADJUSTMENTS)
"""Keys of a policy that are sent only where they have an effect: an older edge refuses what it does not know."""


def encode_open(message: Open) -> bytes:
    fields = message.model_dump(exclude_none=True)
    policy = fields["policy"]
    policy["mode"] = message.policy.mode.value
    for name in OMITTED:
        if policy[name] == SamplingPolicy.model_fields[name].default:
            del policy[name]
    if message.policy.grammar is not None:
        policy["grammar"]["kind"] = message.policy.grammar.kind.value
    return _dump_map(fields)


def decode_open(payload: bytes) -> Open:
    """Read an Open of at most `MAX_OPEN_BYTES`; raise MessageTooLarge or MalformedMessage."""
    fields = _map(payload, bound=MAX_OPEN_BYTES)
    try:
        return Open.model_validate(fields)
    except ValidationError as error:
        protocol = fields.get("protocol")
        if type(protocol) is int and PROTOCOL < protocol < 1 << 16:
            # A newer protocol may look different.
            sentence = f"The Open speaks protocol {protocol}, this release {PROTOCOL}: update the edge first."
            raise MalformedMessage(sentence) from error
        raise MalformedMessage.from_validation("Open", error) from error


def encode_close(message: Close) -> bytes:
    return _dump_map(message.model_dump(exclude_none=True) | {"handle": message.handle})


def decode_close(payload: bytes) -> Close:
    """Read a Close of at most `MAX_CLOSE_BYTES`; raise MessageTooLarge or MalformedMessage."""
    return _validated(Close, _map(payload, bound=MAX_CLOSE_BYTES))


def encode_reply(message: SessionReply) -> bytes:
    fields = message.model_dump(exclude_none=True)
    if isinstance(message, Opened) and message.load is not None:
        fields["load"] = _pack_load(message.load)
    return _dump_map(fields)


def decode_reply(payload: bytes) -> SessionReply:
    """Read an Opened, Refused, Closed or Fault, distinguished by `kind`.

    Raise MessageTooLarge above `MAX_REPLY_BYTES`, MalformedMessage for anything else.
    """
    fields = _map(payload, bound=MAX_REPLY_BYTES)
    if "load" in fields:
        fields = {**fields, "load": _unpack_load(fields["load"])}
    try:
        return _REPLY.validate_python(fields)
    except ValidationError as error:
        raise MalformedMessage.from_validation("session reply", error) from error


def _dump_map(fields: dict[str, Any]) -> bytes:
    for key in ("prompt", "resume", "end_tokens"):
        if key in fields:
            fields[key] = pack_ids(fields[key])
    return cbor2.dumps({key: _plain(value) for key, value in fields.items()})


def _plain(value: object) -> object:
    if isinstance(value, str):
        return str(value)
    return value


def _half(milliseconds: float) -> float:
    """Round to a half-precision float: three bytes, three digits, up to 65 s."""
    return float(np.float16(min(milliseconds, 65504.0)))


def _pack_next(following: int | DownlinkForm | UnknownForm | None) -> object:
    if following is None or isinstance(following, int):
        return following
    if isinstance(following, UnknownForm):
        raise ValueError("an unknown form cannot be sent")  # noqa: TRY004 - a value, not a type
    return pack_form(following)


def _unpack_next(following: object) -> object:
    if following is None or isinstance(following, int):
        return following
    form = unpack_form(following)
    if form is None:
        raise MalformedMessage("The verdict has neither a token nor a form of the target distribution.")
    return form


def _pack_load(load: EdgeLoad | None) -> object:
    if load is None:
        return None
    times = (load.writing_ms, load.step_ms, load.request_ms, load.token_ms, load.acceptance)
    return [load.requests, *(None if each is None else _half(each) for each in times), load.free]


def _unpack_load(packed: object) -> object:
    if packed is None:
        return None
    if not isinstance(packed, list) or len(packed) < _LOAD_FIELDS:
        raise MalformedMessage("The edge's load is not an array of seven.")
    return dict(zip(EdgeLoad.model_fields, packed, strict=False))


def _pack_logprobs(logprobs: Logprobs | None) -> object:
    if logprobs is None:
        return None
    return [pack_probabilities(logprobs.own), pack_ids(logprobs.ids), pack_probabilities(logprobs.values)]


def _unpack_logprobs(packed: object) -> object:
    if packed is None:
        return None
    if not isinstance(packed, list) or len(packed) < _LOGPROBS_FIELDS:
        raise MalformedMessage("The verdict's log-probabilities are not three typed arrays.")
    own, ids, values = packed[:_LOGPROBS_FIELDS]
    return {"own": own, "ids": ids, "values": values}


def _counts(packed: object) -> list[int] | None:
    if packed is None:
        return None
    if isinstance(packed, list) and all(type(count) is int for count in packed):
        return [count + 1 for count in packed]
    raise MalformedMessage("The draft's counts are not a typed array of integers.")


def _array(payload: bytes, layout: Sequence[str], *, bound: int, least: int) -> dict[str, Any]:
    """Return the fields of an array by name, None for missing ones; padding begins with a byte string."""
    value = load(payload, bound=bound)
    if not isinstance(value, list) or len(value) < least:
        raise MalformedMessage(f"The message is not an array of at least {least} fields.")
    optional = takewhile(lambda field: not isinstance(field, bytes), value[least:])
    return dict.fromkeys(layout) | dict(zip(layout, [*value[:least], *optional], strict=False))


def _map(payload: bytes, *, bound: int) -> Mapping[str, Any]:
    value = load(payload, bound=bound)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise MalformedMessage("The message is not a map with text keys.")
    return value


def _validated(model: type[M], fields: Mapping[str, Any]) -> M:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise MalformedMessage.from_validation(model.__name__, error) from error
