"""A record as one line of text, guarded by a checksum.

::

    <CRC-32 of the rest, 8 hex digits> <kind> <JSON of the fields>

A line that a crash tore, or a disk spoiled, fails its checksum and is skipped; its neighbours are read.
"""

from typing import Final
from zlib import crc32

from pydantic import TypeAdapter, ValidationError

from fleet_edge.store.records import (
    DeviceSeen,
    EdgeSeen,
    EventLogged,
    Record,
    RoundJudged,
    SegmentLeft,
    SegmentProgress,
    SessionClosed,
    SessionOpened,
)

__all__ = ["MAX_LINE_BYTES", "from_line", "to_line"]

MAX_LINE_BYTES: Final = 64 << 10
"""Far above any record, so that a spoiled file costs no more memory than this."""

_KINDS: Final[dict[str, TypeAdapter[Record]]] = {
    kind.__name__: TypeAdapter(kind)
    for kind in (
        DeviceSeen,
        EdgeSeen,
        SessionOpened,
        SegmentProgress,
        RoundJudged,
        SegmentLeft,
        SessionClosed,
        EventLogged,
    )
}
_CRC_DIGITS = 8


def to_line(record: Record) -> bytes:
    """Return the record's line, newline included.

    Raises:
        ValueError: A field cannot be written as JSON.
    """
    kind = type(record).__name__
    body = kind.encode() + b" " + _KINDS[kind].dump_json(record)
    return b"%08x %s\n" % (crc32(body), body)


def from_line(line: bytes) -> Record | None:
    """Read a line back, or return None if it is damaged or of a kind that this version does not know."""
    checksum, _, body = line.rstrip(b"\n").partition(b" ")
    if len(checksum) != _CRC_DIGITS or checksum != b"%08x" % crc32(body):
        return None
    kind, _, fields = body.partition(b" ")
    adapter = _KINDS.get(kind.decode("ascii", "replace"))
    if adapter is None:
        return None
    try:
        return adapter.validate_json(fields)
    except ValidationError:
        return None
