"""Session log: what edges write about devices, sessions, events and loads, and what administrators read of it.

`writer.LogWriter` writes records (`records`), which are merged into tables by the rules of their columns (`merge`), and
`SessionLog` reads them. `alerts` evaluates rules on them. Nothing here imports the service.

The names below are what administrators use; each is imported when it is first asked for.
"""

from typing import TYPE_CHECKING

from fleet_common.lazy import lazy_names

if TYPE_CHECKING:
    from fleet_edge.session_log.alerts.evaluator import RunningAlerts as RunningAlerts
    from fleet_edge.session_log.alerts.rules import AlertGroup as AlertGroup, grouped as grouped
    from fleet_edge.session_log.alerts.settings import load_alert_settings as load_alert_settings
    from fleet_edge.session_log.counters import SegmentCounters as SegmentCounters, share as share
    from fleet_edge.session_log.database import open_existing as open_existing, transaction as transaction
    from fleet_edge.session_log.engine import parse_url as parse_url, shown as shown
    from fleet_edge.session_log.errors import (
        InvalidQuery as InvalidQuery,
        NotFound as NotFound,
        StoreError as StoreError,
        StoreUnavailable as StoreUnavailable,
    )
    from fleet_edge.session_log.event_codes import EventKind as EventKind, Severity as Severity
    from fleet_edge.session_log.filters import (
        AUDIT_FIELDS as AUDIT_FIELDS,
        COMMAND_FIELDS as COMMAND_FIELDS,
        EVENT_FIELDS as EVENT_FIELDS,
        OPERATORS as OPERATORS,
        SESSION_FIELDS as SESSION_FIELDS,
        Filter as Filter,
        are_met as are_met,
        conditions as conditions,
    )
    from fleet_edge.session_log.log import SessionLog as SessionLog
    from fleet_edge.session_log.merge import merge_records as merge_records
    from fleet_edge.session_log.periods import Grain as Grain, floor as floor, following as following
    from fleet_edge.session_log.queries import read_devices as read_devices
    from fleet_edge.session_log.records import ADMINISTRATOR as ADMINISTRATOR, event_record as event_record
    from fleet_edge.session_log.steering import (
        add_labels as add_labels,
        audit_text as audit_text,
        read_labels as read_labels,
        record_audit as record_audit,
        retire as retire,
    )
    from fleet_edge.session_log.tables import (
        ACCOUNTS as ACCOUNTS,
        AUDIT as AUDIT,
        COMMANDS as COMMANDS,
        DEVICES as DEVICES,
        LABELS as LABELS,
        LOGINS as LOGINS,
    )
    from fleet_edge.session_log.totals import Distribution as Distribution, SpentTime as SpentTime
    from fleet_edge.session_log.views import (
        CONNECTED as CONNECTED,
        DONE as DONE,
        EDGES_ALONE as EDGES_ALONE,
        AlertView as AlertView,
        AuditEntry as AuditEntry,
        AuditView as AuditView,
        CommandView as CommandView,
        DeviceView as DeviceView,
        EdgeView as EdgeView,
        EventCount as EventCount,
        EventView as EventView,
        LoadView as LoadView,
        MachineState as MachineState,
        QuarantineView as QuarantineView,
        RoundView as RoundView,
        SegmentView as SegmentView,
        SessionView as SessionView,
        Tally as Tally,
        UsageView as UsageView,
    )

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, __file__)
