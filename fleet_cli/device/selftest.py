"""`fleet device selftest`: what a rollout gates on."""

from typing import Annotated

import typer

from fleet_cli.checks import ignore_check, show_check
from fleet_cli.errors import ExitCode
from fleet_cli.settings_flags import with_settings
from fleet_device.checks.selftest import SelfTest
from fleet_device.settings import DeviceSettings
from schemas.printable import json_text


@with_settings(DeviceSettings)
def selftest_command(
    settings: DeviceSettings,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Check configuration, model, broker, edge and a real text, one after the other.

    Exit code 0 if all is well, 1 if a check failed, 2 if the configuration cannot be read. Not while the device
    runs as a service.
    """
    report = SelfTest(settings, on_check=ignore_check if as_json else show_check).run()
    if as_json:
        print(json_text(report.json(), indent=2))
    if not report.ok:
        raise typer.Exit(ExitCode.CHECK_FAILED)
