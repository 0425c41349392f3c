import importlib
from collections import Counter
from collections.abc import Iterator

import click
import pytest
import typer
from typer.testing import CliRunner

from fleet_admin.dashboard.settings import DashboardSettings
from fleet_cli.commands import COMMANDS
from fleet_cli.options import with_settings


def _commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    yield " ".join(path), command
    for name, child in getattr(command, "commands", {}).items():
        yield from _commands(child, (*path, name))


@pytest.mark.parametrize("group", COMMANDS)
def test_no_command_declares_an_option_twice(group: str) -> None:
    module = importlib.import_module(COMMANDS[group].module)
    found = dict(_commands(typer.main.get_command(module.app), ("fleet", group)))
    declared = {
        path: Counter(name for each in command.params for name in {*each.opts, *each.secondary_opts})
        for path, command in found.items()
    }
    twice = {(path, name) for path, names in declared.items() for name, times in names.items() if times > 1}
    assert not twice


def test_the_dashboard_takes_an_identity_at_the_broker_and_another_certificate_for_its_pages() -> None:
    taken: list[DashboardSettings] = []
    app = typer.Typer()

    @app.command()
    @with_settings(DashboardSettings)
    def serve(settings: DashboardSettings) -> None:
        taken.append(settings)

    broker = ("--ca", "ca.pem", "--certificate", "dashboard.pem", "--key", "dashboard.key")
    pages = ("--https-certificate", "pages.pem")
    done = CliRunner().invoke(app, ["--steer", "--fleet", "north", *broker, *pages], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    [settings] = taken
    assert (str(settings.broker.certificate), str(settings.broker.key)) == ("dashboard.pem", "dashboard.key")
    assert str(settings.https_certificate) == "pages.pem"
