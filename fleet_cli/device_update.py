"""`fleet device update`: one attempt of the updater."""

from pathlib import Path
from typing import Annotated

import typer

from fleet_cli.errors import CommandError
from fleet_common.host import locked
from fleet_common.mqtt.settings import TlsSettings

Programs = Annotated[Path, typer.Option(help="Folder of programs, releases and links.")]
Models = Annotated[Path, typer.Option(help="Folder of the models.")]


def update_command(
    *,
    url: Annotated[str, typer.Option(metavar="URL", help="Repository of signed releases (https).")],
    root: Annotated[Path, typer.Option(help="Trusted root metadata, root.json.")],
    ca: Annotated[Path, typer.Option(help="Certificate authorities (PEM) of the repository's server.")],
    certificate: Annotated[Path, typer.Option(help="This device's certificate (PEM).")],
    key: Annotated[Path, typer.Option(help="Private key (PEM).")],
    folder: Annotated[Path, typer.Option(help="Folder that the service shares, its `update_dir`.")] = Path(
        "/var/lib/fleet/updates"
    ),
    programs: Programs = Path("/opt/fleet"),
    models: Models = Path("/var/lib/fleet/models"),
    trial_s: Annotated[float, typer.Option(min=1, help="Longest self-test of a release (seconds).")] = 900.0,
) -> None:
    """Bring this device to the release that its service was asked for. systemd starts it every few minutes.

    It downloads what is missing, checks the signatures, installs the release next to the running one, restarts the
    service with it, waits for its self-test, and returns to the previous release if that fails.
    It prints each stage, and what it waits for.
    """
    from fleet_device.updates.handoff import UpdateFolder, UpdateState
    from fleet_device.updates.layout import UpdatePaths
    from fleet_device.updates.repository import Repository
    from fleet_device.updates.updater import Updater

    shown = False

    def show(state: UpdateState) -> None:
        nonlocal shown
        shown = True
        print(f"Release {state.release}: {state.stage}. {state.sentence}".rstrip(), flush=True)

    if not url.startswith("https://"):
        raise CommandError(f"{url!r} is no address of a repository; it begins with https://.")
    try:
        with locked(folder, timeout_s=1.0):
            tls = TlsSettings(ca, certificate, key)
            repository = Repository(url, root.read_bytes(), folder / "metadata", tls)
            state = Updater(
                UpdateFolder(folder), UpdatePaths(programs, models), repository, trial_s=trial_s, show=show
            ).run()
    except OSError as error:
        raise CommandError(f"The updater cannot work: {error}.") from error
    if state is None:
        print("No release is desired.")
    elif not shown:
        show(state)
