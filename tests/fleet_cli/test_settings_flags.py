from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from fleet_cli.device import app as device_app
from fleet_cli.edge import app as edge_app
from fleet_cli.options import with_settings
from fleet_common.settings import Settings, fields_of
from fleet_device.settings import DeviceSettings
from fleet_edge.settings import EdgeSettings

taken: list[tuple[str, DeviceSettings, bool]] = []


@with_settings(DeviceSettings, only=("fleet", "top_k", "ahead", "models_dir", "broker.host", "broker.port"))
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
    assert (settings.fleet, settings.top_k, settings.ahead, settings.models_dir) == ("north", 7, False, tmp_path)
    assert (settings.broker.host, settings.broker.port) == ("here", 1884)


def test_a_command_has_no_option_that_it_did_not_ask_for() -> None:
    with pytest.raises(KeyError):
        with_settings(DeviceSettings, only=["nonsense"])
    app = typer.Typer()
    app.command()(command)
    assert CliRunner().invoke(app, ["hello", "--seed", "1"]).exit_code == 2


@pytest.mark.parametrize(
    ("app", "command", "model"),
    [
        (device_app, "run", DeviceSettings),
        (device_app, "generate", DeviceSettings),
        (device_app, "doctor", DeviceSettings),
        (edge_app, "run", EdgeSettings),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_setting_but_a_secret_has_a_flag(app: typer.Typer, command: str, model: type[Settings]) -> None:
    group = typer.main.get_command(app)
    found = {flag for parameter in group.commands[command].params for flag in parameter.opts}  # type: ignore[attr-defined]
    wanted = {field.flag for field in fields_of(model)} - {None}
    assert wanted <= found
    assert not {"--password", "--api-token", "--token"} & found
