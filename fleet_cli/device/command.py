"""Command group `fleet device`."""

import typer

from fleet_cli import enroll
from fleet_cli.device.app import app as applications
from fleet_cli.device.chat import chat_command
from fleet_cli.device.doctor import doctor_command
from fleet_cli.device.forget import forget_command
from fleet_cli.device.generate import generate_command
from fleet_cli.device.prefix import prefix_command
from fleet_cli.device.run import run_command
from fleet_cli.device.selftest import selftest_command

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command("run")(run_command)
app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command("doctor")(doctor_command)
app.command("selftest")(selftest_command)
app.command("forget")(forget_command)
app.command("prefix")(prefix_command)
app.add_typer(applications, name="app", help="Applications that may use the local API: their keys and quotas.")
enroll.register(app)
