"""Command group `fleet admin`: what an administrator reads and does."""

import typer

from fleet_cli.admin import access, accounts, listing, operations, sessions, steering, updates, usage

app = typer.Typer(name="admin", help="Monitor and steer a fleet.", no_args_is_help=True)
for _title, _part in {
    "Lists": listing,
    "Devices and sessions": sessions,
    "Usage": usage,
    "Steering": steering,
    "Access": access,
    "Releases that gateways pull": updates,
    "Operations": operations,
    "Dashboard accounts": accounts,
}.items():
    _commands, _groups = len(app.registered_commands), len(app.registered_groups)
    _part.register(app)
    for _command in app.registered_commands[_commands:]:
        _command.rich_help_panel = _title
    for _group in app.registered_groups[_groups:]:
        _group.rich_help_panel = _title
