"""`fleet device doctor`: what is wrong with a device, and what to do about it."""

from typing import Annotated

import typer

from fleet_cli.checks import ignore_check, show_check
from fleet_cli.errors import ExitCode
from fleet_cli.settings_flags import with_settings
from fleet_device.checks.doctor import Doctor
from fleet_device.settings import DeviceSettings
from schemas.printable import json_text


@with_settings(DeviceSettings)
def doctor_command(
    settings: DeviceSettings,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Look at memory, threads, model, broker, certificate, clock, edge and vocabulary, and say what to do.

    Exit code 0 if all is well, 1 if a check failed, 2 if the configuration cannot be read. It may be run beside the
    device's service, which is then asked in place of the broker.
    """
    diagnosis = Doctor(settings, on_check=ignore_check if as_json else show_check).run()
    if as_json:
        print(json_text(diagnosis.json(), indent=2))
    if not diagnosis.ok:
        raise typer.Exit(ExitCode.CHECK_FAILED)
