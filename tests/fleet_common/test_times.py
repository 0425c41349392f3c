from datetime import UTC, datetime, timedelta, timezone

import pytest

from fleet_common.times import read_duration, read_time

NOW = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("90s", NOW - timedelta(seconds=90)),
        (" 2h ", NOW - timedelta(hours=2)),
        ("7d", NOW - timedelta(days=7)),
        (timedelta(minutes=30), NOW - timedelta(minutes=30)),
        ("2026-03-04T10:30", NOW),
        ("2026-03-04T12:30+02:00", NOW),
        (datetime(2026, 3, 4, 10, 30), NOW),  # noqa: DTZ001 - without a zone on purpose
        (datetime(2026, 3, 4, 12, 30, tzinfo=timezone(timedelta(hours=2))), NOW),
    ],
)
def test_ages_and_times_are_points_in_time(given: str | datetime | timedelta, meant: datetime) -> None:
    read = read_time(given, now=NOW)
    assert read == meant
    assert read.utcoffset() == timedelta(0)


@pytest.mark.parametrize("wrong", ["", "2", "h", "-2h", "2h30m", "2026-13-01", "999999999d", timedelta(days=999999999)])
def test_what_is_neither_an_age_nor_a_time_is_refused_by_name(wrong: str | timedelta) -> None:
    with pytest.raises(ValueError, match="neither an age"):
        read_time(wrong, now=NOW)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("90s", timedelta(seconds=90)), (" 2h ", timedelta(hours=2)), (timedelta(days=1), timedelta(days=1))],
)
def test_durations_are_read(given: str | timedelta, meant: timedelta) -> None:
    assert read_duration(given) == meant


@pytest.mark.parametrize("wrong", ["", "0s", "-1h", "2026-03-04", "1h\x1b[2J", timedelta(0), timedelta(seconds=-1)])
def test_what_is_no_duration_is_refused_by_name(wrong: str | timedelta) -> None:
    with pytest.raises(ValueError, match="is no duration such as") as caught:
        read_duration(wrong)
    assert "\x1b" not in str(caught.value)


def test_control_characters_in_what_was_given_are_not_printed() -> None:
    with pytest.raises(ValueError, match="neither an age") as caught:
        read_time("\x1b[2J" + "x" * 100, now=NOW)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 150
