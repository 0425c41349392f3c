"""Session log: devices, sessions, rollups, events, quarantines, settings, alerts, accounts.

Until the first release this revision makes the tables that `tables` describes. A release writes them out here, since a
released migration stays as it is when the models change.
"""

from alembic import op

from fleet_edge.session_log.tables import METADATA

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    METADATA.create_all(op.get_bind())
