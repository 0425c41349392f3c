"""`fleet admin profile`: the settings that an operator's commands begin with."""

from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import SecretStr

from broker_config.broker import toml_lines
from fleet_admin.settings import AdminSettings
from fleet_cli.errors import CommandError
from fleet_cli.options import AsJson, profile_file, usual_profile, with_settings
from fleet_cli.tables import Column, print_json, print_table
from fleet_common.host import write_atomically
from fleet_common.settings import SettingField, fields_of

_FIELDS: Final = fields_of(AdminSettings)


@with_settings(AdminSettings, file=profile_file, creates=True)
def profile(
    context: typer.Context,
    *,
    settings: AdminSettings,
    db: Annotated[str | None, typer.Option("--db", help="sqlite:///PATH or postgresql://USER@HOST/NAME.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Write these settings to the profile.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the settings that `fleet admin` begins with, or save them: fleet, broker, session log, prices.

    The profile is the file that FLEET_ADMIN_CONFIG names, or else ~/.config/fleet/admin.toml. Flags and variables
    override it.
    """
    from fleet_edge.store.engine import parse_url, shown, sqlite_path

    origins = {field.name: settings.origin(field.name) or "the default" for field in _FIELDS}
    if db is not None:
        origins["db"], settings.db = "flag --db", db
    url = parse_url(settings.db)
    if origins["db"] != "the default" and (path := sqlite_path(url)):
        settings.db = f"sqlite:///{path}"
    file = Path(context.params["config"] or profile_file() or usual_profile())
    if save:
        _save(file, settings)
    values = {field.name: _value(settings, field) for field in _FIELDS} | {"db": shown(url)}
    if as_json:
        print_json(values)
        return
    columns: list[Column[SettingField]] = [
        Column("setting", lambda field: field.name, rank=0),
        Column("value", lambda field: values[field.name], rank=0),
        Column("from", lambda field: origins[field.name], "sentence", rank=0),
    ]
    print_table(f"{'Saved in' if save else 'Profile'} {file}", columns, _FIELDS)


def _value(settings: AdminSettings, field: SettingField) -> Any:  # noqa: ANN401 - of the setting's type
    value: Any = settings
    for name in field.path:
        value = getattr(value, name)
    return str(value) if isinstance(value, Path | SecretStr) else value


def _save(file: Path, settings: AdminSettings) -> None:
    """Write what differs from the defaults, with paths that hold in any folder."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        values = _plain(settings.model_dump(exclude_defaults=True))
        write_atomically(file, "\n".join([*toml_lines(values), ""]).encode())
    except OSError as error:
        raise CommandError(f"The profile {file} cannot be written: {error.strerror}.") from error


def _plain(value: Any) -> Any:  # noqa: ANN401 - of any setting
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value.absolute()) if isinstance(value, Path) else value


def register(app: typer.Typer) -> None:
    app.command()(profile)
