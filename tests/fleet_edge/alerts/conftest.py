from tests.fleet_edge.store.conftest import database_url, empty_databases, postgres, store

__all__ = ["database_url", "empty_databases", "postgres", "store"]
