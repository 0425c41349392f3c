from pathlib import Path

import pytest

from fleet_admin.reports import SESSIONS
from fleet_edge import SessionLog
from fleet_edge.session_log.database import open_store
from tests.fleet_edge.store import samples


@pytest.mark.parametrize(
    ("counted", "ended", "shown"),
    [
        ({"tokens": 0, "prefill_tokens": 640, "reused_tokens": 64}, False, "704 of 1,000, 4 s"),
        ({"tokens": 0, "reused_tokens": 64}, False, "64 of 1,000"),
        ({"tokens": 0, "prefill_tokens": 1640}, False, "1,000 of 1,000"),  # again, after an eviction
        ({"tokens": 1, "prefill_tokens": 999}, False, None),
        ({"tokens": 0, "prefill_tokens": 640}, True, None),
    ],
)
def test_a_running_session_shows_how_much_of_its_prompt_is_computed(
    tmp_path: Path, counted: dict[str, int], ended: bool, shown: str | None
) -> None:
    url = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    with open_store(url) as store:
        store.apply([samples.opened(prompt_tokens=1000), samples.progress(at=samples.after(9), **counted)])
        if ended:
            store.apply([samples.closed()])
    (prompt,) = [column for column in SESSIONS if column.key == "prompt"]
    with SessionLog(url) as log:
        (session,) = log.sessions()
        assert prompt.value(session) == shown
