import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet_edge.session_log.database import Store, open_store
from tests.support.memory_edges import Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    with site.broker.running():
        yield site


@pytest.fixture
def store(tmp_path: Path, tables: Path) -> Iterator[Store]:
    with open_store(f"sqlite:///{shutil.copy(tables, tmp_path)}") as opened:
        yield opened
