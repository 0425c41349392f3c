"""Tables of the database; importing this package registers all of them."""

from fleet_edge.store.models.accounts import AccountRow, ApiKeyRow, LoginRow
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
from fleet_edge.store.models.rollouts import RolloutRow

__all__ = [
    "REVISION",
    "AccountRow",
    "ApiKeyRow",
    "Base",
    "DeviceRow",
    "EdgeRow",
    "EventRow",
    "FenceLiftRow",
    "FenceRow",
    "LoginRow",
    "ReportedCloseRow",
    "RolloutRow",
    "RollupRow",
    "RoundRow",
    "SegmentRow",
    "SessionRow",
]
