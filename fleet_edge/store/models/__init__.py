"""Tables of the database; importing this package registers all of them."""

from fleet_edge.store.models.accounts import AccountRow, ApiKeyRow, LoginRow
from fleet_edge.store.models.alerts import AlertLeaseRow, AlertRow
from fleet_edge.store.models.base import REVISION, Base
from fleet_edge.store.models.log import (
    DeviceRow,
    EdgeRow,
    EventRow,
    FenceLiftRow,
    FenceRow,
    ReportedCloseRow,
    RoundRow,
    SegmentRow,
    SessionRow,
)
from fleet_edge.store.models.rollouts import RolloutRow
from fleet_edge.store.models.rollups import (
    DeviceRollupRow,
    DistributionRow,
    FleetRollupRow,
    RollupMarkRow,
    RollupRow,
    StaleHourRow,
)
from fleet_edge.store.models.steering import (
    AuditRow,
    CommandRow,
    LabelRow,
    ReportedSettingsRow,
    WantedSettingsRow,
)
from fleet_edge.store.models.texts import TextRow

__all__ = [
    "REVISION",
    "AccountRow",
    "AlertLeaseRow",
    "AlertRow",
    "ApiKeyRow",
    "AuditRow",
    "Base",
    "CommandRow",
    "DeviceRollupRow",
    "DeviceRow",
    "DistributionRow",
    "EdgeRow",
    "EventRow",
    "FenceLiftRow",
    "FenceRow",
    "FleetRollupRow",
    "LabelRow",
    "LoginRow",
    "ReportedCloseRow",
    "ReportedSettingsRow",
    "RolloutRow",
    "RollupMarkRow",
    "RollupRow",
    "RoundRow",
    "SegmentRow",
    "SessionRow",
    "StaleHourRow",
    "TextRow",
    "WantedSettingsRow",
]
