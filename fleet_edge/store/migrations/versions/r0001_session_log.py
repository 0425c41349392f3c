"""Session log: devices, sessions, rollups, events, fences, settings, alerts, accounts.

Tables are written as in `models`, but apart from them: a migration stays as it is when the models change.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "": sa.Text(),
    "int": sa.BigInteger(),
    "float": sa.Double(),
    "time": sa.DateTime(timezone=True),
    "bool": sa.Boolean(),
}
_COUNTERS = (
    "tokens:int=0 rounds:int=0 drafted:int=0 tested:int=0 accepted:int=0 uplink_bytes:int=0 "
    "downlink_bytes:int=0 queue_ms:float=0 compute_ms:float=0 batch_sum:int=0 prefill_ms:float=0 "
    "resampled:int=0 prefill_tokens:int=0 reused_tokens:int=0 streamed:int=0 guessed:int=0 guessed_right:int=0 "
    "forced:int=0"
)


def _column(text: str) -> sa.Column[Any]:
    """Read `name[:type][?][=default]`: a text unless a type is given, and not null without the question mark."""
    declared, equals, default = text.partition("=")
    name, _, kind = declared.rstrip("?").partition(":")
    server_default = sa.false() if kind == "bool" else default
    return sa.Column(
        name, _TYPES[kind], nullable=declared.endswith("?"), server_default=server_default if equals else None
    )


def _table(
    name: str,
    columns: str,
    *,
    key: str,
    indexes: Sequence[str] = (),
    references: Mapping[str, str] | None = None,
    **options: bool,
) -> None:
    foreign = []
    for own, target in (references or {}).items():
        table, _, ondelete = target.partition(" ")
        foreign.append(
            sa.ForeignKeyConstraint(
                own.split(),
                [f"{table}.{column}" for column in own.split()],
                name=op.f(f"fk_{name}_{own.replace(' ', '_')}"),
                ondelete=ondelete or None,
            )
        )
    primary = sa.PrimaryKeyConstraint(*key.split(), name=op.f(f"pk_{name}"))
    op.create_table(name, *map(_column, columns.split()), *foreign, primary, **options)
    for index in indexes:
        op.create_index(op.f(f"ix_{name}_{index.replace(' ', '_')}"), name, index.split())


def upgrade() -> None:
    _table(
        "accounts",
        "account role password? created_at:time changed_at:time",
        key="account",
    )
    _table(
        "alert_leases",
        "name holder until_at:time",
        key="name",
    )
    _table(
        "alerts",
        "id rule subject device? severity sentence value:float? threshold:float? since_at:time last_at:time "
        "cleared_at:time? cleared_by? acknowledged_at:time? acknowledged_by?",
        key="id",
        indexes=["since_at"],
    )
    op.create_index(
        "uq_alerts_open",
        "alerts",
        ["rule", "subject"],
        unique=True,
        sqlite_where=sa.text("cleared_at IS NULL"),
        postgresql_where=sa.text("cleared_at IS NULL"),
    )
    _table(
        "api_keys",
        "fingerprint name account role created_at:time expires_at:time? used_at:time?",
        key="fingerprint",
        indexes=["account"],
    )
    _table(
        "audit",
        "id at:time who action subject before? after? outcome source",
        key="id",
        indexes=["at", "subject at", "who at"],
    )
    _table(
        "commands",
        "id batch device command arguments who at:time deadline_at:time outcome? sentence? ended_at:time?",
        key="id",
        indexes=["at", "batch", "device at"],
    )
    _table(
        "device_rollups",
        f"grain start:time device app sessions:int visits:int segments:int duration_ms:float {_COUNTERS}",
        key="grain start device app",
        indexes=["device grain start"],
        sqlite_with_rowid=False,
    )
    _table(
        "devices",
        "device presence? software? draft_model? quantization? state_at:time? first_seen_at:time seen_at:time "
        "silent_since:time? presence_since:time? certificate_until:time? telemetry_at:time? plan? "
        "round_trip_ms:float? told_acceptance:float? draft_ms_per_token:float? retired_at:time?",
        key="device",
    )
    _table(
        "distributions",
        "grain start:time edge measure counts",
        key="grain start edge measure",
        sqlite_with_rowid=False,
    )
    _table(
        "edges",
        "edge presence? software? target? vocabulary? state_at:time? first_seen_at:time seen_at:time "
        "presence_since:time? certificate_until:time? load_at:time? open_sessions:int? most_sessions:int? "
        "batch_sessions:float? step_ms:float? queue_ms:float? tokens_per_s:float? kv_usage:float? "
        "spooled_records:int?",
        key="edge",
    )
    _table(
        "events",
        "id edge device? session? kind code sentence at:time count:int=1 last_at:time who? severity=info",
        key="id",
        indexes=["at", "code at", "device at", "edge at", "kind at", "session", "severity at"],
    )
    _table(
        "fence_lifts",
        "device lifted_at:time lifted_by",
        key="device",
    )
    _table(
        "fences",
        "device fenced_by since_at:time until_at:time? reason strikes:int level:int",
        key="device fenced_by",
        indexes=["until_at"],
    )
    _table(
        "fleet_rollups",
        "grain start:time edge app draft_model quantization sessions:int visits:int segments:int duration_ms:float "
        f"{_COUNTERS}",
        key="grain start edge app draft_model quantization",
        sqlite_with_rowid=False,
    )
    _table(
        "labels",
        "device label at:time who",
        key="device label",
        indexes=["label device"],
    )
    _table(
        "logins",
        "fingerprint account address created_at:time seen_at:time expires_at:time",
        key="fingerprint",
        indexes=["account", "expires_at"],
    )
    _table(
        "reported_closes",
        "session device closed_at:time reason tokens:int device_tokens:int device_rounds:int device_drafted:int "
        "device_tested:int device_accepted:int device_uplink_bytes:int device_downlink_bytes:int "
        "device_draft_ms:float device_wait_ms:float device_wall_ms:float device_unverified:int=0 end_code? "
        "end_sentence?",
        key="session device",
        indexes=["closed_at", "device closed_at"],
    )
    _table(
        "rollouts",
        "rollout host kind name action wanted? found? running? started_at:time ended_at:time? outcome sentence who",
        key="rollout host",
        indexes=["kind name started_at", "started_at"],
    )
    _table(
        "rollup_marks",
        "name at:time",
        key="name",
    )
    _table(
        "rollups",
        "grain start:time device edge app draft_model quantization sessions:int visits:int segments:int "
        "duration_ms:float "
        f"{_COUNTERS}",
        key="grain start device edge app draft_model quantization",
        indexes=["device grain start"],
        sqlite_with_rowid=False,
    )
    _table(
        "settings_reported",
        "device version:int applied:int settings refused needs_restart fixed at:time? heard_at:time",
        key="device",
    )
    _table(
        "settings_wanted",
        "device version:int settings who at:time",
        key="device",
    )
    _table(
        "stale_hours",
        "hour:time writer changes:int",
        key="hour writer",
    )
    _table(
        "sessions",
        "session device app? opened_at:time last_at:time last_segment:int described_by:int? draft_model? "
        "quantization? target? mode? temperature:float? top_k:int? top_p:float? seed? prompt_tokens:int? "
        "max_new_tokens:int? reason? closed_at:time? tokens:int? device_counted_at:time? device_tokens:int? "
        "device_rounds:int? device_drafted:int? device_tested:int? device_accepted:int? device_uplink_bytes:int? "
        "device_downlink_bytes:int? device_draft_ms:float? device_wait_ms:float? device_wall_ms:float? "
        "device_unverified:int? end_code? end_sentence? edge? edge_segment:int? moved:bool=false",
        key="session device",
        indexes=["device last_at", "device opened_at", "edge opened_at", "last_at", "opened_at", "reason opened_at"],
        references={"device": "devices"},
    )
    op.create_index(
        "ix_sessions_moved",
        "sessions",
        ["opened_at"],
        unique=False,
        sqlite_where=sa.text("moved"),
        postgresql_where=sa.text("moved"),
    )
    _table(
        "segments",
        "session segment:int device app? edge? draft_model? quantization? target? resumed_tokens:int? "
        "open_bytes:int? reason? closed_at:time? duration_ms:float first_token_ms:float? gap_p95_ms:float? "
        f"{_COUNTERS}",
        key="session segment",
        indexes=["edge segment", "segment"],
        references={"edge": "edges", "session device": "sessions CASCADE"},
    )
    _table(
        "rounds",
        "session segment:int round:int base:int drafted:int tested:int accepted:int batch:int uplink_bytes:int "
        "downlink_bytes:int form? queue_ms:float compute_ms:float at:time prefill_ms:float=0",
        key="session segment round",
        indexes=["at"],
        references={"session segment": "segments CASCADE"},
    )
    _table(
        "texts",
        "session segment:int start:int kinds ids? pieces? hash? at:time",
        key="session segment start",
        indexes=["at"],
        references={"session segment": "segments CASCADE"},
    )
