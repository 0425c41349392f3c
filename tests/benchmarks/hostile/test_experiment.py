import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.hostile.experiment import Result
from benchmarks.hostile.suite import wrong_with
from benchmarks.processes import Cores
from tests.support.brokers import require_mosquitto


def good() -> Result:
    return Result("opens", baseline=20.0, honest_control=0.95, honest_during=0.93, honest_after=1.0, fresh_device_s=0.2)


def test_a_fleet_that_held_out_is_told_from_one_that_did_not() -> None:
    assert not list(wrong_with(good()))
    for name, value in (
        ("honest_during", 0.5),
        ("honest_after", 0.5),
        ("edge_rss_mb", 101.0),
        ("rows", 101.0),
        ("fresh_device_s", 1.1),
        ("edge_died", True),
        ("broker_died", True),
        ("differing_texts", 1),
    ):
        result = good()
        setattr(result, name, value)
        assert list(wrong_with(result)), name


def test_what_the_attackers_own_processor_time_takes_is_not_the_edges_fault() -> None:
    result = good()
    result.honest_during, result.honest_during_of_control = 0.7, 0.95
    assert not list(wrong_with(result))


def test_the_edge_has_half_of_the_cores_for_itself_if_there_are_two() -> None:
    assert Cores.choose([0, 1], apart=True) == Cores(frozenset({1}), frozenset({0}))
    assert Cores.choose([0, 1, 2], apart=True) == Cores(frozenset({1, 2}), frozenset({0}))
    assert Cores.choose([0, 1], apart=False).edge == {0, 1}
    assert not Cores.choose([4], apart=True).apart


@pytest.mark.broker
@pytest.mark.slow
def test_an_attack_on_a_real_broker_and_a_scripted_edge_is_measured(tmp_path: Path) -> None:
    require_mosquitto()
    report = tmp_path / "hostile.json"
    arguments = [
        "hostile",
        "attacks",
        "--scripted",
        "--attack",
        "unknown-session-qos0",
        "--seconds",
        "3",
        "--baseline",
        "1",
        "--honest",
        "2",
    ]
    code = main([*arguments, "--tokens", "32", "--json", str(report), "--folder", str(tmp_path / "logs")])
    assert code in {0, 1}  # how well the fleet holds out on a busy machine is not for a test
    (attack,) = json.loads(report.read_text())["rows"]
    assert attack["name"] == "unknown-session-qos0"
    assert attack["baseline"] > 0
    assert attack["attacker"]["sent_per_s"] > 500
    assert attack["attacker"]["connects"] == 1
    assert attack["newcomers_s"]
    assert not attack["edge_died"]
    assert not attack["broker_died"]
    assert {"honest_during", "honest_after", "edge_rss_mb", "rows", "fresh_device_s"} <= attack.keys()
