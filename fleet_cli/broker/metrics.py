"""`fleet broker metrics`: a broker's own figures for Prometheus, read as a monitor."""

import signal
import threading
from pathlib import Path
from typing import Annotated, Final

import typer
from pydantic import ValidationError

from fleet_cli.broker.figures import BrokerFigures
from fleet_cli.broker.watch import broker_settings
from fleet_cli.errors import CommandError
from fleet_common.metrics import MetricsServer, MetricsSettings, require_library
from fleet_common.mqtt.paho_link import PahoLink

_START_S: Final = 15.0


def register(app: typer.Typer) -> None:
    app.command("metrics")(metrics_command)


def metrics_command(
    host: Annotated[str, typer.Option(help="Broker's host.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Broker's port.")] = 8883,
    name: Annotated[str, typer.Option(help="The monitor's name, and no other program's.")] = "monitor",
    ca: Annotated[Path | None, typer.Option(help="Who vouches for the broker (PEM).")] = None,
    certificate: Annotated[Path | None, typer.Option(help="The monitor's certificate (PEM).")] = None,
    key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    listen: Annotated[str, typer.Option(help="Address and port of /metrics.")] = "127.0.0.1:9465",
    token_file: Annotated[Path | None, typer.Option(help="File with the bearer token; needed beyond loopback.")] = None,
) -> None:
    """Serve what a mosquitto says of itself below $SYS, as metrics for Prometheus, until interrupted.

    Edges have no right to read it: it tells of the whole broker. A monitor has.
    """
    try:
        settings = MetricsSettings(listen=listen, token_file=token_file)
    except ValidationError as error:
        sentence = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise CommandError(f"--listen: {sentence.replace('metrics.token_file', '--token-file')}.") from error
    if settings.address is None:
        raise CommandError("--listen: give an address and a port, such as 127.0.0.1:9465.")
    require_library()
    chosen = broker_settings(host=host, port=port, ca=ca, certificate=certificate, key=key)
    link = PahoLink(chosen.link("_broker", name, will=None))
    figures = BrokerFigures(link)
    figures.subscribe()
    server = MetricsServer(settings.address, figures.pages(), token=settings.token())
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    link.start(timeout_s=_START_S)
    server.start()
    typer.echo(f"The broker's figures are at {server.url}/metrics.", err=True)
    try:
        while not stop.wait(0.5):
            pass
    finally:
        server.stop()
        link.stop()
