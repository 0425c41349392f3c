"""Tables of the database; importing this package registers all of them."""

from fleet_edge.store.models.base import REVISION, Base
from fleet_edge.store.models.log import (
    DeviceRow,
    EdgeRow,
    EventRow,
    FenceLiftRow,
    FenceRow,
    ReportedCloseRow,
    RollupRow,
    RoundRow,
    SegmentRow,
    SessionRow,
)

__all__ = [
    "REVISION",
    "Base",
    "DeviceRow",
    "EdgeRow",
    "EventRow",
    "FenceLiftRow",
    "FenceRow",
    "ReportedCloseRow",
    "RollupRow",
    "RoundRow",
    "SegmentRow",
    "SessionRow",
]
