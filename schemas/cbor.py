"""CBOR (RFC 8949) as messages use it, with typed arrays for ids, counts and probabilities (RFC 8746).

Before decoding, one pass over the bytes checks that there are few items, shallow nesting, definite lengths within the
payload, and no tags but typed arrays. So hostile input costs no more than its own size.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, Final

import cbor2
import numpy as np

from schemas.errors import MalformedMessage, MessageTooLarge

MAX_ITEMS: Final = 256
"""Data items in a message. Everything long is a typed array, which counts as two."""

_MAX_DEPTH: Final = 6
_MAX_ARRAY: Final = 1 << 18  # items in a typed array; above the support of p in the largest packet

# RFC 8746: little-endian typed arrays. The narrowest that holds the values is sent.
UINT16, UINT32, FLOAT32 = 69, 70, 85
_TYPED: Final[dict[int, np.dtype[Any]]] = {UINT16: np.dtype("<u2"), UINT32: np.dtype("<u4"), FLOAT32: np.dtype("<f4")}

# First byte of an item: three bits of major type, five bits of argument (RFC 8949, 3).
_BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = 2, 3, 4, 5, 6, 7
_DIRECT: Final = 24  # smaller arguments are in the first byte itself
_WIDEST: Final = 27  # 24 to 27: in the next 1, 2, 4 or 8 bytes; above are indefinite lengths
_KNOWN_SIMPLE: Final = frozenset({20, 21, 22, 25, 26, 27})  # false, true, null, and the three widths of float


def pack_ids(ids: Sequence[int]) -> cbor2.CBORTag:
    """Return token ids as a typed array of two bytes each, or four if needed."""
    return _pack(UINT16 if max(ids, default=0) < 1 << 16 else UINT32, ids)


def pack_counts(counts: Sequence[int]) -> cbor2.CBORTag:
    """Return counts of 1 to 65,536, minus one, as a typed array of two bytes each."""
    return _pack(UINT16, [count - 1 for count in counts])


def pack_probabilities(probs: Sequence[float]) -> cbor2.CBORTag:
    """Return probabilities as a typed array of float32."""
    return _pack(FLOAT32, probs)


def load(payload: bytes, *, bound: int) -> object:
    """Decode one data item.

    Raise MessageTooLarge above `bound` bytes, MalformedMessage outside the part of CBOR that messages use.
    """
    if len(payload) > bound:
        raise MessageTooLarge(size=len(payload), bound=bound)
    try:
        _survey(payload)
    except IndexError:
        raise MalformedMessage("The message ends in the middle.") from None
    decoder = cbor2.CBORDecoder(
        io.BytesIO(payload), semantic_decoders=_DECODERS, allow_duplicate_keys=False, strict_hashable_types=True
    )
    try:
        return decoder.decode()
    except (cbor2.CBORError, ValueError, TypeError, OverflowError) as error:
        # The cause may quote any amount of the payload.
        raise MalformedMessage(f"The message is not the CBOR that was agreed: {str(error)[:200]}.") from error


def _survey(payload: bytes) -> None:
    """Check the items' heads without decoding them; raise MalformedMessage, or IndexError at the payload's end."""
    at, items = 0, 0
    due = [1]  # items still to come, by level of nesting
    while due:
        if due[-1] == 0:
            due.pop()
            continue
        due[-1] -= 1
        items += 1
        if items > MAX_ITEMS:
            raise MalformedMessage(f"The message has more than {MAX_ITEMS} data items.")
        major, argument, at = _head(payload, at)
        if major in (_BYTES, _TEXT):
            at += argument
        elif major in (_ARRAY, _MAP, _TAG):
            if len(due) > _MAX_DEPTH:
                raise MalformedMessage("The message is nested too deeply.")
            due.append(1 if major == _TAG else argument * (2 if major == _MAP else 1))
        if at > len(payload):
            raise IndexError
    if at != len(payload):
        raise MalformedMessage("The message has bytes after its end.")


def _head(payload: bytes, at: int) -> tuple[int, int, int]:
    """Return an item's major type and argument, and where its contents begin."""
    major, short = payload[at] >> 5, payload[at] & 31
    width = 0 if short < _DIRECT else 1 << (short - _DIRECT)
    if short > _WIDEST or (major == _SIMPLE and short not in _KNOWN_SIMPLE):
        raise MalformedMessage("The message has an indefinite length, or a value that no message uses.")
    end = at + 1 + width
    if end > len(payload):
        raise IndexError
    argument = int.from_bytes(payload[at + 1 : end], "big") if width else short
    if major == _TAG and argument not in _TYPED:
        raise MalformedMessage(f"The message has the tag {argument}, which no message uses.")
    return major, argument, end


def _pack(tag: int, values: Sequence[int] | Sequence[float]) -> cbor2.CBORTag:
    return cbor2.CBORTag(tag, np.asarray(values, dtype=_TYPED[tag]).tobytes())


def _typed_array(dtype: np.dtype[Any]) -> Callable[[object, bool], list[int] | list[float]]:
    def decode(raw: object, _immutable: bool) -> list[int] | list[float]:
        if not isinstance(raw, bytes) or len(raw) > _MAX_ARRAY * dtype.itemsize:
            raise ValueError(f"a typed array is no byte string, or holds more than {_MAX_ARRAY} items")
        values: list[int] | list[float] = np.frombuffer(raw, dtype=dtype).tolist()
        return values

    return decode


_DECODERS: Final = {tag: _typed_array(dtype) for tag, dtype in _TYPED.items()}
