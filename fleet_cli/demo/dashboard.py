"""Dashboard of the demo: the fleet goes on writing, its devices as services, until Ctrl-C."""

import contextlib
import http.client
import itertools
import json
import queue
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from fleet_admin.dashboard.accounts.roles import Role
from fleet_admin.dashboard.settings import DashboardSettings
from fleet_cli.admin.actor import actor_of
from fleet_cli.demo.brokers import Place
from fleet_cli.demo.processes import Child
from fleet_cli.errors import CommandError
from fleet_common.logs import Event

_PORT: Final = 8400
_HOST: Final = "127.0.0.1"
_NAME: Final = "monitor"  # the identity that the demo's brokers have for administrators
_ACCOUNT: Final = "demo"
_TEXT_S: Final = 120.0
_AGAIN_S: Final = 2.0


def run_dashboard(
    console: Console,
    place: Place,
    *,
    fleet: str,
    db: str,
    folder: Path,
    devices: Sequence[str],
    arguments: Sequence[str],
    prompts: Sequence[str],
    edge: Child,
) -> None:
    """Serve the dashboard over the demo's fleet until Ctrl-C.

    Args:
        console: Where its address is said.
        place: The broker.
        fleet: The fleet's name.
        db: URL of the session log.
        folder: For what devices keep from one run to the next; goes with the demo.
        devices: Their names.
        arguments: Settings of all devices, as flags.
        prompts: That they write to, in turn.
        edge: Whose end is the demo's.

    Raises:
        CommandError: The dashboard cannot be served, or the edge or the broker has ended.
    """
    try:
        from fleet_admin.dashboard.server import DashboardServer
        from fleet_admin.dashboard.services import Services, open_services
    except ModuleNotFoundError as error:
        raise CommandError(
            f"The package {error.name!r} is missing; install this one with the extra 'dashboard'."
        ) from error
    settings = DashboardSettings(
        db=db, listen=f"{_HOST}:{_free(_PORT)}", steer=True, fleet=fleet, name=_NAME, broker=_broker(place)
    )
    services: Services = open_services(settings)
    password = _account(services)
    stopped = threading.Event()
    with ExitStack() as stack:
        server = DashboardServer(settings, services=services)
        stack.callback(server.stop)
        stack.callback(stopped.set)
        for number, name in enumerate(devices):
            api_port = _free()
            stack.enter_context(_service(name, [*arguments, *place.arguments(name)], api_port=api_port, folder=folder))
            own = itertools.islice(itertools.cycle(prompts), number, None)
            threading.Thread(target=_write, args=(api_port, own, stopped), daemon=True).start()
        console.print(
            f"The dashboard is at {server.address} (name {_ACCOUNT}, password {password}); the devices go on writing. "
            "Ctrl-C stops all of it.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            while edge.process.poll() is None and place.lives():
                stopped.wait(1.0)
            raise CommandError("The broker or the edge has ended, and the demo with it: see the lines above.")


def _account(services: Any) -> str:  # noqa: ANN401 - the dashboard's, which is imported late
    """Make the demo's account anew; return its password."""
    password, actor = secrets.token_urlsafe(12), actor_of("demo")
    if services.accounts.role(_ACCOUNT) is not None:
        services.accounts.remove(_ACCOUNT, actor=actor)
    services.accounts.add(_ACCOUNT, role=Role.OPERATOR, password=password, actor=actor)
    return password


def _broker(place: Place) -> dict[str, Any]:
    """Return the broker's settings of an administrator, from the flags that one would give."""
    flags = place.arguments(_NAME)
    return {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}


@contextlib.contextmanager
def _service(name: str, arguments: Sequence[str], *, api_port: int, folder: Path) -> Iterator[None]:
    """Run a device as a service; on entry it takes requests."""
    said: queue.SimpleQueue[str] = queue.SimpleQueue()

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == Event.SERVING:
            said.put("serving")

    own = ["--device", name, "--api-port", str(api_port), "--steering-dir", str(folder / name)]
    child = Child.spawn(
        name, ["device", "run", "--events", *own, *arguments], on_event=hear, on_end=lambda: said.put("")
    )
    try:
        if not said.get():
            child.end()
            raise CommandError(f"The device {name} did not start: {child.cause}")
        yield
    finally:
        child.ask_to_stop()
        child.end()


def _write(api_port: int, prompts: Iterator[str], stopped: threading.Event) -> None:
    """Have a device write one text after another."""
    for prompt in prompts:
        if stopped.is_set():
            return
        connection = http.client.HTTPConnection(_HOST, api_port, timeout=_TEXT_S)
        try:
            body = json.dumps({"messages": [{"role": "user", "content": prompt}]})
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            refused = connection.getresponse().status != http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            refused = True
        finally:
            connection.close()
        if refused:
            stopped.wait(_AGAIN_S)


def _free(wanted: int = 0) -> int:
    """Return a port that is free: the wanted one if it is, else any."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server((_HOST, port)) as listener:
            return int(listener.getsockname()[1])
    raise CommandError(f"There is no free port on {_HOST}.")
