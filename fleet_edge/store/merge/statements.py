"""Updates of a merge, the same in every SQL dialect: each yields to what is later, or was first.

Parameters of updates are named `b_<column>`: they must differ from the columns' own names.
"""

from collections.abc import Sequence
from typing import Final

from sqlalchemy import bindparam, case, or_, true, update
from sqlalchemy.sql.dml import Update

from fleet_edge.store.models import Base, DeviceRow, SegmentRow, SessionRow

SESSION_DESCRIPTION: Final = (
    "app",
    "draft_model",
    "quantization",
    "target",
    "mode",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "prompt_tokens",
    "max_new_tokens",
)
SEGMENT_DESCRIPTION: Final = (
    "app",
    "edge",
    "draft_model",
    "quantization",
    "target",
    "resumed_tokens",
    "open_bytes",
)
DEVICE_STATE: Final = ("presence", "software", "draft_model", "quantization", "certificate_until")
EDGE_STATE: Final = ("presence", "software", "target", "vocabulary", "certificate_until", "presence_since")
DEVICE_TELEMETRY: Final = ("plan", "round_trip_ms", "told_acceptance", "draft_ms_per_token")
EDGE_LOAD: Final = (
    "open_sessions",
    "most_sessions",
    "batch_sessions",
    "step_ms",
    "queue_ms",
    "tokens_per_s",
    "kv_usage",
    "spooled_records",
)
DEVICE_COUNTERS: Final = (
    "tokens",
    "rounds",
    "drafted",
    "tested",
    "accepted",
    "uplink_bytes",
    "downlink_bytes",
    "draft_ms",
    "wait_ms",
    "wall_ms",
    "unverified",
)


def set_latest(row: type[Base], key: str, names: Sequence[str], *, at: str = "state_at") -> Update:
    """Return an update that yields only to a later state, whose time is in the column `at`."""
    table = row.__table__
    return (
        update(row)
        .where(table.c[key] == bindparam("b_key"))
        .where(or_(table.c[at].is_(None), table.c[at] < bindparam("b_at")))
        .values({at: bindparam("b_at"), **{name: bindparam(f"b_{name}") for name in names}})
    )


DEVICE_PRESENCE_SINCE = (
    update(DeviceRow)
    .where(DeviceRow.device == bindparam("b_key"))
    .where(or_(DeviceRow.presence_since.is_(None), DeviceRow.presence_since < bindparam("b_presence_since")))
    .values(presence_since=bindparam("b_presence_since"))
)


_OF_SESSION: Final = (SessionRow.session == bindparam("b_session"), SessionRow.device == bindparam("b_device"))

DESCRIBE_SESSION = (
    update(SessionRow)
    .where(*_OF_SESSION)
    .where(or_(SessionRow.described_by.is_(None), SessionRow.described_by > bindparam("b_segment")))
    .values({"described_by": bindparam("b_segment"), **{name: bindparam(f"b_{name}") for name in SESSION_DESCRIPTION}})
)
# Whichever of two edges is told of last finds the other.
_ELSEWHERE: Final = SessionRow.edge != bindparam("b_edge")
_LATER: Final = or_(SessionRow.edge_segment.is_(None), SessionRow.edge_segment < bindparam("b_segment"))
SERVE_SESSION = (
    update(SessionRow)
    .where(*_OF_SESSION, or_(_LATER, _ELSEWHERE))
    .values(
        moved=case((_ELSEWHERE, true()), else_=SessionRow.moved),
        edge=case((_LATER, bindparam("b_edge")), else_=SessionRow.edge),
        edge_segment=case((_LATER, bindparam("b_segment")), else_=SessionRow.edge_segment),
    )
)
DESCRIBE_SEGMENT = (
    update(SegmentRow)
    .where(SegmentRow.session == bindparam("b_session"), SegmentRow.segment == bindparam("b_segment"))
    .where(SegmentRow.edge.is_(None))
    .values({name: bindparam(f"b_{name}") for name in SEGMENT_DESCRIPTION})
)
CLOSE_SEGMENT = (
    update(SegmentRow)
    .where(SegmentRow.session == bindparam("b_session"), SegmentRow.segment == bindparam("b_segment"))
    .where(or_(SegmentRow.closed_at.is_(None), SegmentRow.closed_at < bindparam("b_at")))
    .values(reason=bindparam("b_reason"), closed_at=bindparam("b_at"))
)
CLOSE_SESSION = (
    update(SessionRow)
    .where(*_OF_SESSION, SessionRow.last_segment == bindparam("b_segment"), SessionRow.device_counted_at.is_(None))
    .where(or_(SessionRow.closed_at.is_(None), SessionRow.closed_at < bindparam("b_at")))
    .values(
        reason=bindparam("b_reason"),
        closed_at=bindparam("b_at"),
        tokens=bindparam("b_tokens"),
        end_code=bindparam("b_code"),
        end_sentence=bindparam("b_sentence"),
    )
)
CLOSE_BY_DEVICE = (
    update(SessionRow)
    .where(*_OF_SESSION)
    .where(or_(SessionRow.device_counted_at.is_(None), SessionRow.device_counted_at < bindparam("b_at")))
    .values(
        {
            "reason": bindparam("b_reason"),
            "closed_at": bindparam("b_at"),
            "tokens": bindparam("b_tokens"),
            "device_counted_at": bindparam("b_at"),
            "end_code": bindparam("b_code"),
            "end_sentence": bindparam("b_sentence"),
            **{f"device_{name}": bindparam(f"b_device_{name}") for name in DEVICE_COUNTERS},
        }
    )
)
