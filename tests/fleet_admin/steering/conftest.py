from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from fleet_admin.steering import Actor, SteeringLog
from fleet_edge.session_log.database import open_store
from tests.fleet_edge.store import samples

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)
ALICE = Actor("alice", "desk")


@pytest.fixture
def url(database_url: str) -> str:
    with open_store(database_url) as store:
        store.apply(
            [
                samples.device_seen(
                    device=f"gw-{number}",
                    at=NOW,
                    presence="online" if number != 3 else "offline",
                    software="0.2",
                    draft_model="small" if number == 1 else "large",
                    quantization="Q4_0",
                )
                for number in (1, 2, 3)
            ]
        )
    return database_url


@pytest.fixture
def log(url: str) -> Iterator[SteeringLog]:
    with SteeringLog(url, now=lambda: NOW) as opened:
        yield opened
