import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fleet_device.drafters.contract import DrafterError
from fleet_device.settings import DeviceSettings
from fleet_device.steering.remote_settings import SteeredSettings, load_steered
from fleet_device.updates.handoff import STATE, TESTED, WANTED, TrialResult, UpdateFolder, UpdateState, WantedUpdate
from schemas.control import DesiredSettings, ReportedSettings, UpdateStage, decode_json, encode_json

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)
TRIAL = "0123456789abcdef"


@pytest.fixture
def shared(tmp_path: Path) -> UpdateFolder:
    (tmp_path / "updates" / "inbox").mkdir(parents=True)
    return UpdateFolder(tmp_path / "updates")


def on_trial(shared: UpdateFolder, **fields: Any) -> UpdateState:
    state = UpdateState(release=3, stage=UpdateStage.TESTING, trial=TRIAL, previous="old", at=NOW, **fields)
    shared.write(STATE, state)
    return state


def steered(shared: UpdateFolder, **fields: Any) -> SteeredSettings:
    folder = shared.path.parent
    return SteeredSettings.of(DeviceSettings(update_dir=shared.path, state_dir=folder / "state", **fields))


def desired(number: int, **values: Any) -> DesiredSettings:
    return DesiredSettings(id=f"{number:08x}", values={f"update.{name}": value for name, value in values.items()})


def test_the_desired_release_reaches_the_updater_and_its_report_the_administrator(shared: UpdateFolder) -> None:
    remote = steered(shared)
    remote.consider(desired(1, release=3, kbyte_per_s=50, window="01:00-05:00"))
    wanted = WantedUpdate(release=3, kbyte_per_s=50, window="01:00-05:00")
    assert shared.read(WantedUpdate, WANTED) == wanted
    state = on_trial(shared, running="update-3", highest=2)
    report = decode_json(ReportedSettings, encode_json(remote.report()))
    assert report.update is not None
    assert (report.update.release, report.update.stage, report.update.running) == (3, state.stage, "update-3")
    assert report.values["update.release"] == 3
    assert steered(shared).report().values["update.release"] == 3, "also after a restart"
    remote.consider(desired(2))
    assert shared.read(WantedUpdate, WANTED) == WantedUpdate()


@pytest.mark.parametrize(
    "values",
    [
        {"release": 0},
        {"release": "../3"},
        {"release": True},
        {"release": 3.0},
        {"url": "https://evil.example"},
        {"sha256": "0" * 64},
        {"kbyte_per_s": 0},
        {"window": "1-5"},
        {"window": "25:00-26:00"},
        {"window": "01:00Z-02"},
    ],
)
def test_the_broker_names_a_number_and_limits_and_nothing_else(shared: UpdateFolder, values: dict[str, Any]) -> None:
    remote = steered(shared)
    remote.consider(desired(1, **values))
    assert list(remote.report().refused) == [f"update.{name}" for name in values]
    assert (shared.read(WantedUpdate, WANTED) or WantedUpdate()).release is None


def test_without_an_updater_a_release_is_refused(tmp_path: Path) -> None:
    remote = SteeredSettings.of(DeviceSettings(state_dir=tmp_path / "state"))
    remote.consider(desired(1, release=3))
    assert "no updater" in remote.report().refused["update.release"]


@pytest.mark.parametrize("window", ["22:00-05:00", "05:00-22:00"])
def test_a_window_may_span_midnight(window: str) -> None:
    wanted = WantedUpdate(window=window)
    at_night = window.startswith("22")
    for hour in range(24):
        assert wanted.allows(NOW.replace(hour=hour)) == ((hour >= 22 or hour < 5) == at_night)


def test_what_the_other_side_damages_does_no_harm(shared: UpdateFolder) -> None:
    inbox = shared.path / "inbox"
    for name, content in (("wanted.json", b"\xff"), ("tested.json", b"[" * 100_000)):
        (inbox / name).write_bytes(content)
    assert shared.read(WantedUpdate, WANTED) is None
    assert shared.read(TrialResult, TESTED) is None
    (inbox / "wanted.json").unlink()
    os.mkfifo(inbox / "wanted.json")
    assert shared.read(WantedUpdate, WANTED) is None
    (inbox / "wanted.json").unlink()
    (inbox / "wanted.json").symlink_to("/etc/hostname")
    assert shared.read(WantedUpdate, WANTED) is None
    (inbox / "wanted.json").unlink()
    (inbox / "wanted.json").write_text('{"release": 3, "later": 1}')
    assert shared.read(WantedUpdate, WANTED) == WantedUpdate(release=3)
    with pytest.raises(ValidationError):
        WantedUpdate(release=1 << 60)


def test_a_trial_is_due_once_and_only_when_the_release_runs(shared: UpdateFolder) -> None:
    assert shared.trial() is None
    on_trial(shared, link="update-3")
    assert shared.trial() is None, "the previous release still runs"
    on_trial(shared)
    assert shared.trial() == TRIAL
    shared.end_trial(TRIAL, ok=True, sentence="Fine.\nReally.")
    assert shared.trial() is None
    result = shared.read(TrialResult, TESTED)
    assert result is not None
    assert result.ok
    assert "\n" not in result.sentence


def test_a_release_whose_model_does_not_load_fails_its_trial(shared: UpdateFolder) -> None:
    remote = steered(shared)
    remote.consider(desired(1, release=3))
    on_trial(shared)

    def load(_: DeviceSettings) -> Any:
        raise DrafterError("The file is no model.")

    with pytest.raises(DrafterError):
        load_steered(remote, load)
    result = shared.read(TrialResult, TESTED)
    assert result == TrialResult(trial=TRIAL, ok=False, sentence="The file is no model.")
    assert shared.read(WantedUpdate, WANTED) == WantedUpdate(release=3), "it is desired all the same"
