"""`fleet device app`: the applications that may use a device's local API."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from fleet_cli.errors import CommandError
from fleet_cli.settings_flags import with_settings
from fleet_device.applications import Application, ApplicationsFile, new_key
from fleet_device.settings import DeviceSettings

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

_Name = Annotated[str, typer.Argument(help="Of the application, in the session log and in errors.")]
_Tokens = Annotated[int | None, typer.Option(help="Most tokens, of prompts and texts; no bound if left out.", min=1)]
_Texts = Annotated[int | None, typer.Option(help="Most texts that are written or wait; no bound if left out.", min=1)]


@app.command("add")
@with_settings(DeviceSettings, only=("applications",))
def add_command(
    name: _Name,
    settings: DeviceSettings,
    *,
    tokens_per_min: _Tokens = None,
    tokens_per_day: _Tokens = None,
    texts_at_once: _Texts = None,
) -> None:
    """Give an application a key, and print it: this once, it is kept nowhere."""
    key, digest = new_key()
    with ApplicationsFile(_path(settings)).changing() as applications:
        if any(each.name == name for each in applications):
            raise CommandError(f"There is an application {name!r} already; remove it first, which ends its key.")
        try:
            added = Application(
                name=name,
                sha256=digest,
                tokens_per_min=tokens_per_min,
                tokens_per_day=tokens_per_day,
                texts_at_once=texts_at_once,
            )
        except ValidationError as error:
            if error.errors()[0]["loc"] != ("name",):
                raise CommandError("A quota is too large: give a smaller number.") from error
            raise CommandError(
                f"{name!r} is no name for an application: it has up to 40 letters, digits, dots, hyphens and "
                "underscores, and begins with a letter or a digit."
            ) from error
        applications.append(added)
    print(key)


@app.command("list")
@with_settings(DeviceSettings, only=("applications",))
def list_command(settings: DeviceSettings) -> None:
    """List the applications and their quotas."""
    found = ApplicationsFile(_path(settings)).read().applications
    if not found:
        print("There are none; `fleet device app add NAME` adds one.")
        return
    print(f"{'application':<40} {'tokens/min':>12} {'tokens/day':>12} {'texts at once':>14}")
    for each in found:
        bounds = [
            "-" if bound is None else str(bound)
            for bound in (each.tokens_per_min, each.tokens_per_day, each.texts_at_once)
        ]
        print(f"{each.name:<40} {bounds[0]:>12} {bounds[1]:>12} {bounds[2]:>14}")


@app.command("remove")
@with_settings(DeviceSettings, only=("applications",))
def remove_command(name: _Name, settings: DeviceSettings) -> None:
    """End the key of an application; a device that runs takes no more of its requests at once."""
    with ApplicationsFile(_path(settings)).changing() as applications:
        kept = [each for each in applications if each.name != name]
        if len(kept) == len(applications):
            raise CommandError(f"There is no application {name!r}; `fleet device app list` shows those that there are.")
        applications[:] = kept
    print(f"The key of {name} is not valid any more.")


def _path(settings: DeviceSettings) -> Path:
    if settings.applications is None:
        raise CommandError("Name the file of the applications: --applications, or `applications` in the configuration.")
    return settings.applications.expanduser()
