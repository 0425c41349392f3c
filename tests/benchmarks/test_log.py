from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from benchmarks.administration.log import Scale, fill, questions
from fleet_edge.session_log.database import open_store
from fleet_edge.session_log.log import SessionLog

NOW = datetime(2027, 2, 3, 4, 5, 6, tzinfo=UTC)


@pytest.fixture(scope="module", params=[1, 9])
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SessionLog]:
    url = f"sqlite:///{tmp_path_factory.mktemp('log')}/log.sqlite3"
    with open_store(url) as store:
        scale = Scale(sessions=300, devices=request.param, days=2)
        fill(store.engine, scale, now=NOW, progress=lambda _doing, _share: None)
    with SessionLog(url, now=lambda: NOW) as log:
        yield log


def test_a_filled_log_ends_now(log: SessionLog) -> None:
    (latest,) = log.sessions(limit=1)
    assert latest.last_at <= NOW + timedelta(minutes=1)
    assert log.usage(since=NOW - timedelta(days=1))[0].counted.sessions > 100
    assert log.usage()[0].counted.sessions == 300


def test_each_question_is_answered_however_few_devices_there_are(log: SessionLog) -> None:
    for question in questions(NOW, len(log.devices())).values():
        question(log)
