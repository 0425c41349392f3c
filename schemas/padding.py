"""Padding: fields behind a message's last, so that its size tells less of what it holds.

TLS hides bytes, not how many there are. A draft's size gives away its tokens' number, a verdict's whether all of them
were accepted and how broad the target's distribution was. Every reader passes over fields behind an array's last, so
each end pads what it sends without asking the other.
"""

from typing import Final

__all__ = ["pad"]

_NULL: Final = b"\xf6"
_MOST_FIELDS: Final = 23  # that an array's head of one byte can count
_ARRAY, _BYTES = 0x80, 0x40  # major types
# A byte string's head, by its length: argument of the first byte (0: the length itself), bytes of length behind it, the
# most that it may be, and the least.
_HEADS: Final = ((26, 4, 0xFFFF_FFFF, 0x10000), (25, 2, 0xFFFF, 0x100), (24, 1, 0xFF, 24), (0, 0, 23, 0))


def pad(payload: bytes, *, bucket: int, most: int) -> bytes:
    """Fill a message up to a multiple of a bucket's size.

    Args:
        payload: A CBOR array of at most 20 fields.
        bucket: Bytes; 0 leaves the message as it is.
        most: Bytes that the message may have: it is filled up to there where the multiple is more.
    """
    if bucket == 0:
        return payload
    left = min(-(-len(payload) // bucket) * bucket, most) - len(payload)
    if left <= 0:
        return payload
    filling, nulls = _byte_string(left)
    fields = payload[0] - _ARRAY + 1 + nulls
    assert fields <= _MOST_FIELDS
    return bytes([_ARRAY | fields]) + payload[1:] + filling + _NULL * nulls


def _byte_string(size: int) -> tuple[bytes, int]:
    """Return the longest byte string of at most `size` bytes, its head counted in, and how many bytes are left over.

    Its length is written in as few bytes as it fits in, so that some sizes cannot be had.
    """
    first, width, most = next(head for head in _HEADS if head[1] + head[3] < size)[:3]
    length = min(size - 1 - width, most)
    head = bytes([_BYTES | (first or length)]) + (length.to_bytes(width, "big") if width else b"")
    return head + bytes(length), size - len(head) - length
