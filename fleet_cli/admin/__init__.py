"""Command group `fleet admin`: what an administrator reads and does."""

import typer

from fleet_cli.admin import accounts, operations, profile, sessions, steering, usage

app = typer.Typer(name="admin", help="See what a fleet does, and steer it.", no_args_is_help=True)
for part in (sessions, usage, steering, operations, profile, accounts):
    part.register(app)
