"""Runs the migrations on the connection that `fleet_edge.session_log.migrate` holds, inside its transaction."""

from alembic import context

from fleet_edge.session_log.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    # SQLite can roll a schema change back too, and so a half-made schema never stays behind.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
