"""Commands of `fleet admin` on the access of devices at the broker, and on its clients."""

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Final

import typer

from fleet_admin import reports
from fleet_admin.settings import AdminSettings
from fleet_cli.admin.listing import Listing, with_listing
from fleet_cli.admin.steering import show_results
from fleet_cli.commands import ExitCode
from fleet_cli.options import (
    DEFAULT_DB,
    Acting,
    AsJson,
    Database,
    actor_of,
    open_log,
    open_steering,
    profile_file,
    steering_log,
    with_settings,
)
from fleet_cli.tables import cell, print_table

_with_profile: Final = with_settings(AdminSettings, file=profile_file)

_ACTIONS: Final = {
    "disconnect": "Have the broker end the sessions of devices; they may connect again at once.",
    "suspend": "Have the broker refuse devices until lifted, and end their sessions.",
    "unsuspend": "Have the broker accept suspended devices again.",
    "revoke": "Revoke the certificates of devices for good, and end their sessions.",
}


def _request(action: str) -> Callable[..., None]:
    def request(
        devices: Annotated[list[str], typer.Argument(metavar="DEVICE…")],
        acting: Acting = None,
        db: Database = DEFAULT_DB,
        as_json: AsJson = False,
    ) -> None:
        with steering_log(db) as log:
            from fleet_admin.steering.access import request_access
            from fleet_common.identity.certificates import AccessAction

            results = list(request_access(log, AccessAction(action), devices, actor=actor_of(acting)))
        results.sort(key=lambda each: each.device)
        show_results(results, as_json=as_json, texts=False)
        if not all(each.ok for each in results):
            raise typer.Exit(ExitCode.CHECK_FAILED)

    return request


@_with_profile
def access(
    device: Annotated[str, typer.Argument(metavar="DEVICE")],
    *,
    settings: AdminSettings,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
) -> None:
    """Show whether a device is connected, whether the broker or the edges refuse it, and its certificate."""
    with open_steering(settings, db) as steering, open_log(db) as log:
        from fleet_admin.steering.access import access_facts

        found = log.device(device)
        facts = access_facts(
            steering.log,
            device,
            client=next((each for each in steering.clients()[0] if each.client == device), None),
            absence="",
            quarantine=next((each for each in log.quarantines() if each.device == device), None),
            certificate_until=found.certificate_until,
            now=datetime.now(UTC),
        )
    print_table(f"Access of {cell(device)}", reports.ACCESS, facts, as_json=as_json)


@_with_profile
@with_listing()
def clients(
    *,
    settings: AdminSettings,
    listing: Listing,
    broker_log: Annotated[
        typer.FileText | None,
        typer.Option(metavar="FILE", help="The broker's log since its start (- for a pipe), instead of the broker."),
    ] = None,
    db: Database = DEFAULT_DB,
) -> None:
    """List the clients as the broker sees them: from the states that it retains, or complete from its log."""
    if broker_log is not None:
        from fleet_admin.steering.clients import BrokerClients

        read = BrokerClients()
        for line in broker_log:
            read.read_line(line)
        listing.show(reports.clients(list(read.named().values()), datetime.now(UTC)))
        return
    with open_steering(settings, db) as steering:
        found, number = steering.clients()
    listing.show(reports.clients(found, datetime.now(UTC)))
    named = sum(each.state == "connected" for each in found)
    counted = "has not published its number of clients" if number is None else f"counts {number} connected clients"
    print(f"The broker {counted}; {named} are named.", file=sys.stderr)


def register(app: typer.Typer) -> None:
    for action, meaning in _ACTIONS.items():
        app.command(action, help=meaning)(_request(action))
    app.command()(access)
    app.command()(clients)
