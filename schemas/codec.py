"""CBOR for the session messages (RFC 8949), with typed arrays for ids, counts and probabilities (RFC 8746).

The two hot messages are arrays, keyed by position; the others are maps. A decoder reads only what a
message can hold: no indefinite lengths, no tags but typed arrays, shallow nesting, and never more
bytes than the message's bound, so that hostile input costs no more than its own size.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn, TypeVar

import cbor2
import numpy as np
from pydantic import BaseModel, TypeAdapter, ValidationError

from schemas.downlink import Dense, Samples, Sparse
from schemas.errors import MalformedMessage, MessageTooLarge
from schemas.messages import Close, Draft, Open, SessionReply, Verdict

__all__ = [
    "MAX_CLOSE_BYTES",
    "MAX_DRAFT_BYTES",
    "MAX_OPEN_BYTES",
    "MAX_REPLY_BYTES",
    "MAX_VERDICT_BYTES",
    "decode_close",
    "decode_draft",
    "decode_open",
    "decode_reply",
    "decode_verdict",
    "encode_close",
    "encode_draft",
    "encode_open",
    "encode_reply",
    "encode_verdict",
]

MAX_DRAFT_BYTES: Final = 1024
MAX_CLOSE_BYTES: Final = 1024
MAX_REPLY_BYTES: Final = 16 << 10
MAX_OPEN_BYTES: Final = 1 << 20
MAX_VERDICT_BYTES: Final = 1 << 20

# RFC 8746: little-endian typed arrays. The narrowest that holds the values is sent.
_UINT16, _UINT32, _FLOAT32 = 69, 70, 85
_TYPED: Final = {_UINT16: np.dtype("<u2"), _UINT32: np.dtype("<u4"), _FLOAT32: np.dtype("<f4")}

_SPARSE, _SAMPLES, _DENSE = 1, 2, 3

_MAX_DEPTH = 4
_DRAFT_FIELDS = 9
_VERDICT_FIELDS = 8

M = TypeVar("M", bound=BaseModel)
_REPLY: TypeAdapter[SessionReply] = TypeAdapter(SessionReply)


def encode_draft(draft: Draft) -> bytes:
    """Return the array [handle, round, epoch, base, fix, tokens, counts, more, digest(, tried)]."""
    fields: list[object] = [
        draft.handle,
        draft.round,
        draft.epoch,
        draft.base,
        draft.fix,
        _pack_ids(draft.tokens),
        # 1..65,536 travels as 0..65,535.
        None if draft.counts is None else _pack(_UINT16, [count - 1 for count in draft.counts]),
        draft.more,
        draft.digest,
    ]
    if draft.tried is not None:
        fields.append(draft.tried)
    return cbor2.dumps(fields)


def decode_draft(payload: bytes) -> Draft:
    """Read a draft.

    Raises:
        MessageTooLarge: It exceeds `MAX_DRAFT_BYTES`.
        MalformedMessage: It is no draft.
    """
    fields = _array(payload, bound=MAX_DRAFT_BYTES, least=_DRAFT_FIELDS)
    handle, round_, epoch, base, fix, tokens, counts, more, digest = fields[:_DRAFT_FIELDS]
    return _validated(
        Draft,
        {
            "handle": handle,
            "round": round_,
            "epoch": epoch,
            "base": base,
            "fix": fix,
            "tokens": tokens,
            "counts": [count + 1 for count in _integers(counts)] if counts is not None else None,
            "more": more,
            "digest": digest,
            "tried": fields[_DRAFT_FIELDS] if len(fields) > _DRAFT_FIELDS else None,
        },
    )


def encode_verdict(verdict: Verdict) -> bytes:
    """Return the array [handle, round, epoch, accepted, next, finish, queue_ms, compute_ms]."""
    return cbor2.dumps(
        [
            verdict.handle,
            verdict.round,
            verdict.epoch,
            verdict.accepted,
            _pack_next(verdict.next),
            int(verdict.finish),
            _half(verdict.queue_ms),
            _half(verdict.compute_ms),
        ],
        canonical=True,  # writes a float in the fewest bytes that hold it
    )


def decode_verdict(payload: bytes) -> Verdict:
    """Read a verdict.

    Raises:
        MessageTooLarge: It exceeds `MAX_VERDICT_BYTES`.
        MalformedMessage: It is no verdict.
    """
    fields = _array(payload, bound=MAX_VERDICT_BYTES, least=_VERDICT_FIELDS)
    handle, round_, epoch, accepted, following, finish, queue_ms, compute_ms = fields[:_VERDICT_FIELDS]
    return _validated(
        Verdict,
        {
            "handle": handle,
            "round": round_,
            "epoch": epoch,
            "accepted": accepted,
            "next": _unpack_next(following),
            "finish": finish,
            "queue_ms": queue_ms,
            "compute_ms": compute_ms,
        },
    )


def encode_open(message: Open) -> bytes:
    """Return the map of an Open, its token ids packed."""
    fields = message.model_dump(exclude_none=True)
    fields["policy"]["mode"] = message.policy.mode.value
    return _dump_map(fields)


def decode_open(payload: bytes) -> Open:
    """Read an Open.

    Raises:
        MessageTooLarge: It exceeds `MAX_OPEN_BYTES`.
        MalformedMessage: It is no Open.
    """
    return _validated(Open, _map(payload, bound=MAX_OPEN_BYTES))


def encode_close(message: Close) -> bytes:
    """Return the map of a Close."""
    return _dump_map(message.model_dump(exclude_none=True) | {"handle": message.handle})


def decode_close(payload: bytes) -> Close:
    """Read a Close.

    Raises:
        MessageTooLarge: It exceeds `MAX_CLOSE_BYTES`.
        MalformedMessage: It is no Close.
    """
    return _validated(Close, _map(payload, bound=MAX_CLOSE_BYTES))


def encode_reply(message: SessionReply) -> bytes:
    """Return the map of an Opened, Refused, Closed or Fault."""
    return _dump_map(message.model_dump(exclude_none=True))


def decode_reply(payload: bytes) -> SessionReply:
    """Read an Opened, Refused, Closed or Fault, told apart by `kind`.

    Raises:
        MessageTooLarge: It exceeds `MAX_REPLY_BYTES`.
        MalformedMessage: It is none of them.
    """
    fields = _map(payload, bound=MAX_REPLY_BYTES)
    try:
        return _REPLY.validate_python(fields)
    except ValidationError as error:
        raise _malformed("session reply", error) from error


def _dump_map(fields: dict[str, Any]) -> bytes:
    for key in ("prompt", "resume", "end_tokens"):
        if key in fields:
            fields[key] = _pack_ids(fields[key])
    return cbor2.dumps({key: _plain(value) for key, value in fields.items()})


def _plain(value: object) -> object:
    """Strip string and integer enums down to what CBOR knows."""
    if isinstance(value, str):
        return str(value)
    return value


def _half(milliseconds: float) -> float:
    """Round to a half-precision float: three bytes, three digits, up to 65 s."""
    return float(np.float16(min(milliseconds, 65504.0)))


def _pack(tag: int, values: Sequence[int] | Sequence[float]) -> cbor2.CBORTag:
    return cbor2.CBORTag(tag, np.asarray(values, dtype=_TYPED[tag]).tobytes())


def _pack_ids(ids: Sequence[int]) -> cbor2.CBORTag:
    return _pack(_UINT16 if max(ids, default=0) < 1 << 16 else _UINT32, ids)


def _pack_next(following: int | Sparse | Samples | Dense | None) -> object:
    match following:
        case Sparse(ids=ids, probs=probs):
            return [_SPARSE, _pack_ids(ids), _pack(_FLOAT32, probs)]
        case Samples(start=start, ids=ids, probs=probs):
            return [_SAMPLES, start, _pack_ids(ids), _pack(_FLOAT32, probs)]
        case Dense(probs=raw):
            return [_DENSE, raw]
        case _:
            return following


def _unpack_next(following: object) -> object:
    match following:
        case [int(form), ids, probs] if form == _SPARSE:
            return {"kind": "sparse", "ids": ids, "probs": probs}
        case [int(form), start, ids, probs] if form == _SAMPLES:
            return {"kind": "samples", "start": start, "ids": ids, "probs": probs}
        case [int(form), bytes(raw)] if form == _DENSE:
            return {"kind": "dense", "probs": raw}
        case list():
            raise MalformedMessage("The verdict has an unknown form of the target distribution.")
        case _:
            return following


def _integers(values: object) -> list[int]:
    if isinstance(values, list) and all(isinstance(value, int) for value in values):
        return values
    raise MalformedMessage("The draft's counts are not a typed array of integers.")


def _array(payload: bytes, *, bound: int, least: int) -> list[Any]:
    value = _load(payload, bound=bound)
    if not isinstance(value, list) or len(value) < least:
        raise MalformedMessage(f"The message is not an array of at least {least} fields.")
    return value


def _map(payload: bytes, *, bound: int) -> Mapping[str, Any]:
    value = _load(payload, bound=bound)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise MalformedMessage("The message is not a map with text keys.")
    return value


def _load(payload: bytes, *, bound: int) -> object:
    if len(payload) > bound:
        raise MessageTooLarge(size=len(payload), bound=bound)
    source = io.BytesIO(payload)
    decoder = cbor2.CBORDecoder(
        source,
        semantic_decoders=_DECODERS,
        max_depth=_MAX_DEPTH,
        allow_indefinite=False,
        allow_duplicate_keys=False,
        strict_hashable_types=True,
    )
    try:
        value: object = decoder.decode()
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise MalformedMessage(f"The message is not the CBOR that was agreed: {error}.") from error
    if source.tell() != len(payload):
        raise MalformedMessage("The message has bytes after its end.")
    return value


def _typed_array(dtype: np.dtype[Any]) -> Callable[[object, bool], list[int] | list[float]]:
    def decode(raw: object, _immutable: bool) -> list[int] | list[float]:
        if not isinstance(raw, bytes) or len(raw) % dtype.itemsize:
            raise ValueError("a typed array does not hold whole items")
        values: list[int] | list[float] = np.frombuffer(raw, dtype=dtype).tolist()
        return values

    return decode


def _reject(_value: object, _immutable: bool) -> NoReturn:
    raise ValueError("a tag that no message uses")


# The library decodes these tags by itself (dates, big numbers, regular expressions, shared
# references, …); none belongs in a message, and some cost more than their bytes.
_BUILT_IN_TAGS = (
    0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 100, 256, 258, 260, 261, 1004, 43000, 55799,
)  # fmt: skip
_DECODERS: Final = dict.fromkeys(_BUILT_IN_TAGS, _reject) | {
    tag: _typed_array(dtype) for tag, dtype in _TYPED.items()
}


def _validated(model: type[M], fields: Mapping[str, Any]) -> M:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _malformed(model.__name__, error) from error


def _malformed(name: str, error: ValidationError) -> MalformedMessage:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "message"
    return MalformedMessage(f"The {name} is invalid at {where}: {first['msg']}.")
