"""The flag `--events` of the commands that other programs run."""

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from fleet_common.logs import EventStream

Command = Callable[..., None]
Events = Annotated[bool, typer.Option("--events", help="Say what happens in JSON lines on standard output.")]


def with_events(*, outlives_reader: bool) -> Callable[[Command], Command]:
    """Give a command the flag `--events`, and in its parameter `events` the stream to write to.

    Errors of users, those of the settings too, are events before they end the program.

    Args:
        outlives_reader: See `EventStream`.
    """

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(*, events: bool, **given: Any) -> None:  # noqa: ANN401 - options of all types, by name
            stream = EventStream(sys.stdout if events else None, outlives_reader=outlives_reader)
            with stream.reporting_errors():
                command(events=stream, **given)

        flag = inspect.Parameter("events", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Events)
        parameters = [
            flag if parameter.name == "events" else parameter
            for parameter in inspect.signature(command).parameters.values()
        ]
        # typer looks at both.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
