from tests.fleet_edge.store.conftest import log, store

__all__ = ["log", "store"]
