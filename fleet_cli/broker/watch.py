"""`fleet broker watch`: says when a broker reaches a limit, which it does not tell the clients concerned."""

import json
import queue
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer
from pydantic import ValidationError

from fleet_cli.broker.limits import SYS_TOPICS, LimitReached, LimitWatch
from fleet_cli.errors import CommandError, ExitCode
from fleet_common.mqtt.link import Link, Message
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings
from fleet_common.validation import field_at, plain_sentence

START_S: Final = 15.0
GLANCE_S: Final = 0.5


def register(app: typer.Typer) -> None:
    app.command("watch")(watch_command)


def watch_command(
    host: Annotated[str, typer.Option(help="Broker's host.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Broker's port.")] = 8883,
    name: Annotated[str, typer.Option(help="The monitor's name.")] = "monitor",
    ca: Annotated[Path | None, typer.Option(help="Who vouches for the broker (PEM).")] = None,
    certificate: Annotated[Path | None, typer.Option(help="The monitor's certificate (PEM).")] = None,
    key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="End after so long; exit code 1 if a limit was reached.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Watch the broker as a monitor, and print a line when a queue, packet or connection limit is reached."""
    link = PahoLink(
        broker_settings(host=host, port=port, ca=ca, certificate=certificate, key=key).link("_broker", name, will=None)
    )
    seen: queue.SimpleQueue[LimitReached | None] = queue.SimpleQueue()
    watch(link, LimitWatch(), seen)
    link.start(timeout_s=START_S)
    reached = 0
    timer = threading.Timer(seconds, seen.put, [None]) if seconds is not None else None
    try:
        if timer is not None:
            timer.start()
        while (event := _next(seen)) is not None:
            reached += 1
            typer.echo(json.dumps(asdict(event)) if as_json else event.sentence)
    finally:
        if timer is not None:
            timer.cancel()
        link.stop()
    if reached:
        raise typer.Exit(ExitCode.CHECK_FAILED)


def broker_settings(**given: object) -> BrokerSettings:
    """Return how a monitor reaches the broker, of the command's options.

    Raises:
        CommandError: They cannot work.
    """
    try:
        return BrokerSettings.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"--{name}: " for name in field_at(BrokerSettings, first))
        why = plain_sentence(first).replace("'broker.", "'--")  # here they are options
        raise CommandError(f"The broker cannot be watched like that: {where}{why}.") from error


def watch(link: Link, limits: LimitWatch, seen: "queue.SimpleQueue[LimitReached | None]") -> None:
    """Subscribe to the broker's log and counter; the news goes to `seen`."""

    def take(message: Message) -> None:
        event = limits.take(message.topic, message.payload)
        if event is not None:
            seen.put(event)

    for topic in SYS_TOPICS:
        link.subscribe(topic, take, qos=0)


def _next(seen: "queue.SimpleQueue[LimitReached | None]") -> LimitReached | None:
    while True:
        try:
            # A wait without an end would not let Ctrl-C through on every system.
            return seen.get(timeout=GLANCE_S)
        except queue.Empty:
            continue
