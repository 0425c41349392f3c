"""Command group `fleet edge`."""

import typer

from fleet_cli import enroll
from fleet_cli.edge.advise.command import advise_command
from fleet_cli.edge.run import run_command
from fleet_cli.edge.selftest import selftest_command

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command("run")(run_command)
app.command("selftest")(selftest_command)
app.command("advise")(advise_command)
enroll.register(app)
