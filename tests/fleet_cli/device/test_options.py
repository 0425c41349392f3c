from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from fleet_cli.device.options import with_settings
from fleet_device.settings import DeviceSettings
from fleet_runtime.settings import SettingsError

taken: list[tuple[str, DeviceSettings, bool]] = []


@with_settings("top_k", "ahead")
def command(
    word: Annotated[str, typer.Argument()], settings: DeviceSettings, *, raw: Annotated[bool, typer.Option()] = False
) -> None:
    """Do something."""
    taken.append((word, settings, raw))


@pytest.fixture
def run() -> object:
    app = typer.Typer()
    app.command()(command)
    taken.clear()

    def invoke(*arguments: str) -> tuple[str, DeviceSettings, bool]:
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return taken.pop()

    return invoke


def test_options_become_settings_and_the_commands_own_stay_its_own(run, tmp_path: Path) -> None:
    config = tmp_path / "device.toml"
    config.write_text('fleet = "north"\ntop_k = 7\n[broker]\nhost = "elsewhere"\nport = 1884\n')
    word, settings, raw = run(
        "--config", str(config), "hello", "--host", "here", "--models-dir", str(tmp_path), "--no-ahead", "--raw"
    )
    assert (word, raw) == ("hello", True)
    assert (settings.fleet, settings.top_k, settings.ahead, settings.models) == ("north", 7, False, tmp_path)
    assert (settings.broker.host, settings.broker.port) == ("here", 1884)


def test_what_is_not_given_is_left_to_the_settings(run) -> None:
    assert run("hello")[1] == DeviceSettings()


def test_a_setting_that_cannot_work_is_told_before_the_command_runs(run) -> None:
    with pytest.raises(SettingsError, match="port"):
        run("hello", "--port", "-1")
    assert taken == []


def test_a_command_has_no_option_that_it_did_not_ask_for() -> None:
    with pytest.raises(KeyError):
        with_settings("nonsense")
    app = typer.Typer()
    app.command()(command)
    assert CliRunner().invoke(app, ["hello", "--seed", "1"]).exit_code == 2
