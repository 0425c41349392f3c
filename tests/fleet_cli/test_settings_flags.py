from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from fleet_cli.device import app as device_app
from fleet_cli.edge import app as edge_app
from fleet_cli.options import with_settings
from fleet_common.settings import Settings, SettingsError, fields_of
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


def test_what_is_not_given_is_left_to_the_settings(run) -> None:
    assert run("hello")[1] == DeviceSettings()


def test_a_setting_that_cannot_work_is_told_before_the_command_runs(run) -> None:
    with pytest.raises(SettingsError, match="port"):
        run("hello", "--port", "-1")
    assert taken == []


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


def test_all_flags_that_cannot_work_are_told_at_once(run) -> None:
    with pytest.raises(SettingsError) as caught:
        run("hello", "--port", "many", "--top-k", "-1", "--fleet", "a/b")
    assert [line.partition(")")[0] for line in str(caught.value).splitlines()] == [
        "The setting 'fleet' = 'a/b' (flag --fleet",
        "The setting 'broker.port' = 'many' (flag --port",
        "The setting 'top_k' = '-1' (flag --top-k",
    ]


def test_the_help_says_meaning_and_default() -> None:
    app = typer.Typer()
    app.command()(command)
    shown = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output.split())
    assert "Folder of the models that are named as NAME:QUANTIZATION. (default models)" in shown
    assert "Number of most likely tokens to keep; 0 keeps all. (default 50 tokens)" in shown
