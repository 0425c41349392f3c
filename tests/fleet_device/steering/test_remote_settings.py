import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from fleet_common.settings import SettingsError
from fleet_device.settings import DeviceSettings
from fleet_device.steering.remote_settings import (
    SteeredSettings,
    check_values,
    load_steered,
    stored_file,
)
from schemas.control import DesiredSettings


def own(tmp_path: Path, **given: Any) -> DeviceSettings:
    (tmp_path / "models" / "small").mkdir(parents=True, exist_ok=True)
    for quantization in ("Q4_0", "Q2_K"):
        (tmp_path / "models" / "small" / f"{quantization}.gguf").touch()
    fields = {"models_dir": tmp_path / "models", "model": "small:Q4_0", "state_dir": tmp_path / "state"}
    return DeviceSettings.model_validate(fields | given)


def remote(settings: DeviceSettings) -> SteeredSettings:
    return SteeredSettings.of(settings)


def wanted(number: int, **values: Any) -> DesiredSettings:
    return DesiredSettings(id=id_of(number), values=values, who="alice")


def id_of(number: int) -> str:
    return f"{number:08x}"


def test_what_is_wanted_holds_at_once_and_is_reported(tmp_path: Path) -> None:
    it = remote(own(tmp_path))
    heard: list[set[str]] = []
    it.on_change(lambda changed: heard.append(set(changed)))
    assert it.consider(wanted(1, temperature=0.25, draft_length=3, offline="wait"))
    assert (it.settings.temperature, it.settings.draft_length, it.settings.offline.value) == (0.25, 3, "wait")
    assert heard == [{"temperature", "draft_length", "offline"}]
    report = it.report()
    assert (report.id, report.refused, report.needs_restart) == (id_of(1), {}, ())
    assert (report.values["temperature"], report.values["offline"], report.values["top_k"]) == (0.25, "wait", 50)


def test_an_invalid_setting_changes_nothing_and_says_why(tmp_path: Path) -> None:
    it = remote(own(tmp_path))
    it.consider(wanted(1, temperature=0.25))
    before = it.settings.model_copy()
    heard: list[object] = []
    it.on_change(heard.append)
    assert it.consider(wanted(2, temperature=0.5, top_k=-1, made_up=1, api_listen=""))
    assert it.settings == before
    assert heard == []
    report = it.report()
    assert (report.id, report.values["temperature"]) == (id_of(2), 0.25)
    assert set(report.refused) == {"top_k", "made_up", "api_listen"}
    assert report.refused["top_k"] == "-1 cannot be used: it must be a whole number from 0 to 1000000."
    assert "cannot be set remotely" in report.refused["api_listen"]
    assert "made_up" in report.refused["made_up"]


def test_what_is_wanted_no_more_is_the_devices_own_again(tmp_path: Path) -> None:
    it = remote(own(tmp_path, temperature=0.4))
    it.consider(wanted(1, temperature=0.25, top_k=5))
    it.consider(wanted(2, top_k=5))
    assert (it.settings.temperature, it.settings.top_k) == (0.4, 5)
    it.consider(wanted(3))
    assert it.settings == own(tmp_path, temperature=0.4)


def test_the_last_message_counts_and_is_considered_once(tmp_path: Path) -> None:
    it = remote(own(tmp_path))
    for number in (5, 4):
        assert it.consider(wanted(number, top_k=number))
        assert not it.consider(wanted(number, top_k=number))
        assert (it.settings.top_k, it.report().id) == (number, id_of(number))
    assert not remote(own(tmp_path)).consider(wanted(4, top_k=4))


def test_what_was_taken_and_what_was_refused_survives_a_restart(tmp_path: Path) -> None:
    it = remote(own(tmp_path))
    it.consider(wanted(1, top_k=5))
    it.consider(wanted(2, top_k=-5))
    again = remote(own(tmp_path))
    assert again.settings.top_k == 5
    report = again.report()
    assert (report.id, list(report.refused)) == (id_of(2), ["top_k"])
    assert not again.consider(wanted(2, top_k=-5))


@given(steps=st.lists(st.tuples(st.integers(1, 6), st.sampled_from([-1, 1, 2, 3]), st.booleans()), max_size=12))
def test_what_is_in_force_was_valid_and_the_last_set_is_reported(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("sets")
    it, holds = remote(own(folder)), 50
    for number, top_k, restarts in steps:
        if restarts:
            it = remote(own(folder))
        it.consider(wanted(number, top_k=top_k))
        if top_k >= 0:
            holds = top_k
        report = it.report()
        assert report.id == id_of(number)
        assert (it.settings.top_k, report.values["top_k"]) == (holds, holds)
        assert bool(report.refused) == (top_k < 0)


def test_a_damaged_or_foreign_file_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = stored_file(own(tmp_path))
    file.parent.mkdir()
    for content in (
        '{"id": -1}',
        "[]",
        "{",
        '{"id":"00000001","desired":{"x":[1]}}',
        "\0" * 300_000,
    ):
        file.write_text(content)
        assert remote(own(tmp_path)).settings == own(tmp_path)
        assert "continues without them" in caplog.text
        caplog.clear()


def test_what_was_set_before_and_cannot_be_any_more_is_left_out_and_reported(tmp_path: Path) -> None:
    it = remote(own(tmp_path))
    it.consider(wanted(1, top_k=5, model="small:Q2_K"))
    (tmp_path / "models" / "small" / "Q2_K.gguf").unlink()
    again = SteeredSettings.of(it._own)
    assert (again.settings.top_k, again.settings.model) == (5, "small:Q4_0")
    assert list(again.report().refused) == ["model"]


def test_a_device_that_listens_to_nobody_keeps_to_its_own(tmp_path: Path) -> None:
    remote(own(tmp_path)).consider(wanted(1, top_k=5))
    assert remote(own(tmp_path, steering=False)).settings.top_k == 50


def test_a_model_is_taken_into_use_with_the_next_start(tmp_path: Path) -> None:
    it = remote(own(tmp_path))
    it.consider(wanted(1, model="small:Q2_K", top_k=5))
    assert (it.settings.model, it.settings.top_k) == ("small:Q4_0", 5)
    assert it.report().needs_restart == ("model",)
    again = remote(own(tmp_path))
    assert again.settings.model == "small:Q2_K"
    assert again.report().needs_restart == ()


@pytest.mark.parametrize(
    "model", ["/etc/passwd", "../models/small", "owner/name:file.gguf", "other.gguf", "a\\b", "small:Q8_0", "none", 5]
)
def test_from_afar_only_prepared_models_that_are_there_can_be_named(tmp_path: Path, model: object) -> None:
    (tmp_path / "other.gguf").touch()
    it = remote(own(tmp_path))
    it.consider(wanted(1, model=model))
    assert list(it.report().refused) == ["model"]


def test_a_device_whose_model_does_not_load_goes_back_and_says_so(tmp_path: Path) -> None:
    def load(settings: DeviceSettings) -> str:
        if settings.model == "small:Q2_K" or settings.threads > 4:
            raise SettingsError("The file is damaged.")
        return settings.model

    it = remote(own(tmp_path))
    assert load_steered(it, load) == "small:Q4_0"  # type: ignore[arg-type, comparison-overlap]
    it.consider(wanted(1, threads=2))
    again = remote(own(tmp_path))
    load_steered(again, load)  # type: ignore[arg-type]
    again.consider(wanted(2, threads=2, model="small:Q2_K", top_k=7))
    third = remote(own(tmp_path))
    assert load_steered(third, load) == "small:Q4_0"  # type: ignore[arg-type, comparison-overlap]
    assert (third.settings.model, third.settings.threads) == ("small:Q4_0", 2), "it goes back to what it last ran with"
    report = third.report()
    assert (report.id, set(report.refused)) == (id_of(2), {"threads", "model"})
    assert "damaged" in report.refused["model"]
    fourth = remote(own(tmp_path))
    load_steered(fourth, load)  # type: ignore[arg-type]
    assert set(fourth.report().refused) == {"threads", "model"}, "and still says so after another restart"


def test_a_device_that_does_not_load_with_its_own_settings_fails(tmp_path: Path) -> None:
    def load(settings: DeviceSettings) -> Any:
        raise SettingsError(f"No {settings.model}.")

    with pytest.raises(SettingsError, match="Q4_0"):
        load_steered(remote(own(tmp_path)), load)


def test_a_disk_that_is_full_is_told_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state").write_text("a file where a folder should be")
    it = remote(own(tmp_path))
    it.consider(wanted(1, top_k=5))
    assert it.settings.top_k == 5
    assert "restart" in caplog.text


def test_what_is_kept_is_for_the_devices_user_alone(tmp_path: Path) -> None:
    it = remote(own(tmp_path))
    it.consider(wanted(1, top_k=5))
    file = stored_file(own(tmp_path))
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert json.loads(file.read_text())["good"] == {"top_k": 5}


def test_settings_that_do_not_go_together_are_refused() -> None:
    checked = check_values({"drafter": "none", "offline": "local"}, DeviceSettings())
    assert set(checked.refused) == {"drafter", "offline"}
    assert set(check_values({"drafter": "none"}, DeviceSettings()).values) == {"drafter"}
