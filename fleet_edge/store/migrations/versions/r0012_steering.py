"""Labels, wanted and reported settings, commands, the audit log, and devices that are out of service."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def _at(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _text(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.Text(), nullable=nullable)


def upgrade() -> None:
    op.add_column("devices", sa.Column("retired_at", sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "labels",
        _text("device"),
        _text("label"),
        _at("at"),
        _text("who"),
        sa.PrimaryKeyConstraint("device", "label", name="pk_labels"),
    )
    op.create_index("ix_labels_label_device", "labels", ["label", "device"])
    op.create_table(
        "settings_wanted",
        _text("device"),
        sa.Column("version", sa.BigInteger(), nullable=False),
        _text("settings"),
        _text("who"),
        _at("at"),
        sa.PrimaryKeyConstraint("device", name="pk_settings_wanted"),
    )
    op.create_table(
        "settings_reported",
        _text("device"),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("applied", sa.BigInteger(), nullable=False),
        _text("settings"),
        _text("refused"),
        _text("needs_restart"),
        _text("fixed"),
        _at("at", nullable=True),
        _at("heard_at"),
        sa.PrimaryKeyConstraint("device", name="pk_settings_reported"),
    )
    op.create_table(
        "commands",
        _text("id"),
        _text("batch"),
        _text("device"),
        _text("command"),
        _text("arguments"),
        _text("who"),
        _at("at"),
        _at("deadline_at"),
        _text("outcome", nullable=True),
        _text("sentence", nullable=True),
        _at("ended_at", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_commands"),
    )
    op.create_index("ix_commands_at", "commands", ["at"])
    op.create_index("ix_commands_device_at", "commands", ["device", "at"])
    op.create_index("ix_commands_batch", "commands", ["batch"])
    op.create_table(
        "audit",
        _text("id"),
        _at("at"),
        _text("who"),
        _text("action"),
        _text("subject"),
        _text("before", nullable=True),
        _text("after", nullable=True),
        _text("outcome"),
        _text("source"),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_at", "audit", ["at"])
    op.create_index("ix_audit_who_at", "audit", ["who", "at"])
    op.create_index("ix_audit_subject_at", "audit", ["subject", "at"])


def downgrade() -> None:
    for table in ("audit", "commands", "settings_reported", "settings_wanted", "labels"):
        op.drop_table(table)
    op.drop_column("devices", "retired_at")
