from pathlib import Path
from typing import Any

import pytest

from fleet_common.settings import SettingsError, load_settings
from fleet_device.api.listening import listen
from fleet_device.device import preflight
from fleet_device.settings import DeviceSettings


def settings(model: Path, **flags: Any) -> DeviceSettings:
    usual = {"model": str(model), "api_listen": ""}
    return load_settings(DeviceSettings, config=None, flags=usual | flags, environment={})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "draft.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_what_is_well_passes(model: Path) -> None:
    preflight(settings(model), serves=True)
    preflight(settings(model, broker={"ca": str(model)}), serves=False)


def test_all_that_cannot_work_is_told_at_once(tmp_path: Path) -> None:
    files = {"ca": "/no/ca.pem", "certificate": "/no/own.pem"}
    with listen() as taken:
        wrong = settings(tmp_path / "none.gguf", api_listen=f"127.0.0.1:{taken.getsockname()[1]}", broker=files)
        with pytest.raises(SettingsError) as caught:
            preflight(wrong, serves=True)
    lines = str(caught.value).splitlines()
    assert [line.rpartition("(")[2] for line in lines] == [
        "setting 'model', flag --model).",
        "setting 'broker.ca', flag --ca).",
        "setting 'broker.certificate', flag --certificate).",
        "setting 'api_listen', flag --api-listen).",
    ]
    assert "does not exist" in lines[0]
    assert "The file /no/ca.pem cannot be read: No such file" in lines[1]
    assert "is in use" in lines[3]


@pytest.mark.parametrize("drafter", ["none", "suffix"])
def test_a_drafter_without_a_model_cannot_go_on_alone(model: Path, drafter: str) -> None:
    with pytest.raises(SettingsError, match=f"{drafter}"):
        preflight(settings(model, drafter=drafter, offline="local"), serves=False)
    preflight(settings(model, drafter=drafter, offline="wait"), serves=False)
