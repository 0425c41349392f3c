"""`fleet asyncapi`: the AsyncAPI document of all topics and messages."""

import typer

from fleet_cli.tables import print_json
from schemas.asyncapi import document

app = typer.Typer(pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def asyncapi_command() -> None:
    """Print the AsyncAPI 3 document of all topics and messages, as JSON, which every reader of YAML reads too."""
    print_json(document())
