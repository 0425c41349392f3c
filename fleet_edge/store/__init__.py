"""Session log: what every device, edge and session did, in SQLite or PostgreSQL.

Written by one thread off the hot path (`writer`), through records that may come late, twice or out of order
(`records`, `merge`); read by administrators through `fleet_edge.session_log`, without Alembic.
"""
