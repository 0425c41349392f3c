import pytest

from fleet_edge.limits import QuarantineSettings, QuotaSettings, Strikes

SETTINGS = QuarantineSettings(strikes=100)


def shut_out_for(strikes: Strikes, now: float) -> float:
    for _ in range(101):
        if (seconds := strikes.add(1.0, now)) > 0.0:
            return seconds
    return 0.0


def test_a_burst_shuts_out_and_each_time_for_twice_as_long_up_to_a_bound() -> None:
    strikes, now, times = Strikes(SETTINGS, 0.0), 0.0, []
    for _ in range(11):
        times.append(shut_out_for(strikes, now))
        now += times[-1]
    assert times == [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600, 3600]


def test_who_keeps_the_peace_begins_anew() -> None:
    strikes = Strikes(SETTINGS, 0.0)
    assert shut_out_for(strikes, 0.0) == 10
    assert shut_out_for(strikes, 10.0 + 10 * 2.9) == 20
    end = 10.0 + 10 * 2.9 + 20
    assert shut_out_for(strikes, end + 20 * 3.1) == 10


@pytest.mark.parametrize(("weight", "slowed"), [(49.0, False), (51.0, True)])
def test_half_of_it_slows(weight: float, slowed: bool) -> None:
    strikes = Strikes(SETTINGS, 0.0)
    strikes.add(weight, 0.0)
    assert strikes.slowed(0.0) is slowed
    assert not strikes.slowed(6.0)


def test_the_first_label_that_a_device_has_stands_in_place_of_everybodys() -> None:
    quotas = QuotaSettings.model_validate(
        {
            "opens_per_min": 40,
            "drafts_per_s": 50,
            "labels": {
                "hall_a": {"devices": ["press-*", "oven-1"], "opens_per_min": 7},
                "presses": {"devices": ["press-1"], "opens_per_min": 9, "kv_share": 0.1},
            },
        }
    )
    assert quotas.of("press-1").opens_per_min == 7
    assert quotas.of("oven-1").opens_per_min == 7
    assert quotas.of("press-1").drafts_per_s == 50
    assert quotas.of("press-1").kv_share == QuotaSettings().kv_share
    assert quotas.of("oven-2").opens_per_min == 40
    assert quotas.of("Press-1").opens_per_min == 40, "names have case"
