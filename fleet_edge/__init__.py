"""Edge: intake, scheduler, verifiers, session store, jobs and administration.

The names below are what applications use; each is imported when it is first asked for, so that `import fleet_edge`
needs neither torch nor SQLAlchemy, and reading the session log needs no torch.
"""

from typing import TYPE_CHECKING

from fleet_common.lazy import lazy_names

if TYPE_CHECKING:
    from fleet_common.mqtt.errors import ConnectFailed
    from fleet_common.settings import SettingsError
    from fleet_edge.edge import Edge
    from fleet_edge.errors import EdgeError
    from fleet_edge.session_log.errors import InvalidQuery, NotFound, StoreError, StoreUnavailable
    from fleet_edge.session_log.log import SessionLog
    from fleet_edge.session_log.views import (
        DeviceView,
        EventView,
        QuarantineView,
        RoundView,
        SegmentView,
        SessionView,
        Tally,
        UsageView,
    )
    from fleet_edge.settings import EdgeSettings
    from fleet_edge.verifiers.contract import VerifierError
    from schemas.errors import FleetError

__all__ = [
    "ConnectFailed",
    "DeviceView",
    "Edge",
    "EdgeError",
    "EdgeSettings",
    "EventView",
    "FleetError",
    "InvalidQuery",
    "NotFound",
    "QuarantineView",
    "RoundView",
    "SegmentView",
    "SessionLog",
    "SessionView",
    "SettingsError",
    "StoreError",
    "StoreUnavailable",
    "Tally",
    "UsageView",
    "VerifierError",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, __file__)
