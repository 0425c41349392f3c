import random
from pathlib import Path

import pytest

from benchmarks.applications.offline import Site, compare, run_trial
from fleet_device.settings import OfflinePolicy

TOKENS = 80


@pytest.mark.broker
def test_texts_fail_wait_or_go_on_alone_and_the_log_says_so(tmp_path: Path) -> None:
    rng = random.Random(3)
    trials = []
    with Site(tmp_path) as site:
        for policy, way in (
            (OfflinePolicy.LOCAL, "cut"),
            (OfflinePolicy.LOCAL, "killed"),
            (OfflinePolicy.FAIL, "dead"),
            (OfflinePolicy.WAIT, "cut"),
        ):
            trials.append(run_trial(site, policy, way, tokens=TOKENS, rng=rng))
        site.wait_until_told()
        assert compare(site.database, trials) == []
    assert [trial.wrong for trial in trials] == [None] * 4
    assert all(trial.unverified for trial in trials[:2])
