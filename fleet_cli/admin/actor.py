"""Actor of a command, and the monitor as which it speaks to devices."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from fleet_cli.errors import CommandError

if TYPE_CHECKING:
    from fleet_admin.settings import AdminSettings
    from fleet_admin.steering import Actor, Selection, Steering, SteeringLog

Acting = Annotated[
    str | None, typer.Option("--as", metavar="NAME", help="Who acts, for the audit log; left out, your user.")
]
Devices = Annotated[list[str] | None, typer.Option("--device", help="This device; may be given several times.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="Devices with this label; may be given several times.")
]
AllDevices = Annotated[bool, typer.Option("--all", help="All devices that are not retired.")]
EdgeOf = Annotated[str | None, typer.Option("--of-edge", help="Of those, that this edge has served within a day.")]
ModelOf = Annotated[str | None, typer.Option("--of-model", help="Of those, with this draft model.")]
Release = Annotated[str | None, typer.Option("--of-release", help="Of those, of this release.")]
Silent = Annotated[
    bool | None,
    typer.Option("--silent/--not-silent", help="Of those, the silent or offline devices."),
]


def actor_of(name: str | None) -> "Actor":
    from fleet_admin.steering import Actor
    from fleet_cli.broker.identity_options import operator

    user = operator()
    return Actor(f"{name} ({user})" if name else user, socket.gethostname())


def selection_of(
    devices: list[str] | None,
    labels: list[str] | None,
    *,
    everything: bool,
    edge: str | None = None,
    model: str | None = None,
    release: str | None = None,
    silent: bool | None = None,
) -> "Selection":
    """Return whom a command concerns.

    Raises:
        SteeringError: Nobody.
    """
    from fleet_admin.steering import Selection

    return Selection(
        devices=tuple(dict.fromkeys(devices or ())),
        labels=tuple(dict.fromkeys(labels or ())),
        everything=everything,
        edge=edge,
        draft_model=model,
        software=release,
        silent=silent,
    )


def steering_log(db: str) -> "SteeringLog":
    """Open the database; all that goes wrong with it becomes one sentence."""
    try:
        from fleet_admin.steering.log import SteeringLog
    except ModuleNotFoundError as error:
        raise CommandError(
            f"The package {error.name!r} is missing; install this one with the extra 'admin'."
        ) from error
    return SteeringLog(db)


@contextmanager
def monitor(settings: "AdminSettings", db: str) -> Iterator["Steering"]:
    """Be a monitor for as long as the context lasts."""
    try:
        from fleet_admin.steering import Steering
    except ModuleNotFoundError as error:
        raise CommandError(
            f"The package {error.name!r} is missing; install this one with the extra 'admin'."
        ) from error
    with Steering.open(settings, db) as steering:
        yield steering
