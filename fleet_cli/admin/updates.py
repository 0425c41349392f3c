"""`fleet admin update`: signed releases that gateways pull, and their rollout."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fleet_admin.report import Report
from fleet_admin.reports import UPDATES
from fleet_admin.settings import AdminSettings
from fleet_cli.admin.listing import Listing, with_listing
from fleet_cli.options import (
    DEFAULT_DB,
    Acting,
    Database,
    PassphraseFile,
    actor_of,
    open_steering,
    profile_file,
    with_selection,
    with_settings,
)

if TYPE_CHECKING:
    from fleet_admin.steering import Selection

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

_with_profile: Final = with_settings(AdminSettings, file=profile_file)

Repository = Annotated[Path, typer.Argument(metavar="REPOSITORY", help="Folder that a static server serves.")]
Keys = Annotated[Path, typer.Option(help="Folder of root.key and release.key, which stays offline.")]


@app.command("create")
def create_command(folder: Repository, *, keys: Keys, passphrase_file: PassphraseFile = None) -> None:
    """Make the keys and an empty repository. With a passphrase, the keys are encrypted."""
    from fleet_admin.releases import create_repository
    from fleet_cli.identities import given_passphrase

    root = create_repository(folder, keys, passphrase=given_passphrase(passphrase_file))
    typer.echo(f"{root} is what gateways trust: set it as device_update_root, and put {keys / 'root.key'} in a safe.")


@app.command("publish")
def publish_command(
    folder: Repository,
    *,
    keys: Keys,
    model: Annotated[Path | None, typer.Option(help="Draft model, a GGUF file.")] = None,
    bundle: Annotated[
        list[Path] | None, typer.Option(help="Archive of scripts/ansible-bundle device, one per kind of machine.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="Days until the signatures expire.")] = 90,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Sign a release with a model, a program or both; without either, renew the signatures."""
    from fleet_admin.releases import publish
    from fleet_cli.identities import given_passphrase

    passphrase = given_passphrase(passphrase_file)
    number = publish(folder, keys, model=model, bundles=bundle or (), valid=timedelta(days=days), passphrase=passphrase)
    typer.echo("The signatures are renewed." if number is None else f"Release {number} is signed for {days} days.")


@app.command("rollout")
@_with_profile
@with_selection
def rollout_command(
    release: Annotated[int, typer.Argument(min=1, metavar="RELEASE")],
    *,
    settings: AdminSettings,
    chosen: "Selection",
    share: Annotated[
        list[str] | None, typer.Option(help="Number or percentage of the devices; repeatable, in order.")
    ] = None,
    failures: Annotated[int, typer.Option(min=0, help="Devices that may fail, or be silent.")] = 0,
    wait: Annotated[float, typer.Option(min=1, help="Longest wait for the devices of a share (seconds).")] = 14_400.0,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
) -> None:
    """Set a release for 1 device, 10 %, 50 % and all, each when the ones before have reported success.

    It stops at the first failure with exit code 2. Called again, it goes on where it has stopped.
    """
    from fleet_admin.steering.rollout import SHARES, roll_out

    with open_steering(settings, db) as steering:
        roll_out(
            steering,
            release,
            chosen,
            share or SHARES,
            actor=actor_of(acting),
            failures=failures,
            wait_s=wait,
            show=typer.echo,
        )


@app.command("status")
@_with_profile
@with_listing()
def status_command(*, settings: AdminSettings, listing: Listing, db: Database = DEFAULT_DB) -> None:
    """Show desired and running releases, progress and failures."""
    from fleet_admin.steering.rollout import update_views

    with open_steering(settings, db) as steering:
        found = update_views(steering.wanted_and_reported())
    listing.show(Report("updates", UPDATES, lambda **_: found, "", empty="No device has reported an update."))


def register(admin: typer.Typer) -> None:
    admin.add_typer(app, name="update", help="Signed releases that gateways pull, and their rollout.")
