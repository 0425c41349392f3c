"""Options that the commands on identities have in common."""

import getpass
import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer
from pydantic import ValidationError

from fleet_cli.errors import CommandError
from fleet_common.identity.authority import Authority
from fleet_common.identity.enforcement import BrokerAccess
from fleet_common.identity.files import IdentityError, read_bounded
from fleet_common.validation import field_at, plain_sentence

PASSPHRASE_VARIABLE: Final = "FLEET_CA_PASSPHRASE"  # noqa: S105 - its name
SUDO_USER: Final = "SUDO_USER"

CaFolder = Annotated[Path, typer.Option("--ca", envvar="FLEET_CA", help="The authority's folder.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(help=f"File with the passphrase of the authority's key; or {PASSPHRASE_VARIABLE}, or you are asked."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Host = Annotated[str | None, typer.Option(help="Where clients reach the broker, to end sessions there.")]
Port = Annotated[int | None, typer.Option(min=1, max=65_535, help="The broker's TLS port.")]
Crl = Annotated[Path | None, typer.Option(help="Where the broker reads its list of revoked certificates.")]
PidFile = Annotated[Path | None, typer.Option(help="The broker's pid file, to reload it.")]
Unit = Annotated[str | None, typer.Option(help="Or the broker's systemd unit, to reload it.")]


def operator() -> str:
    """Return who acts, for the audit log."""
    user = getpass.getuser()
    through = os.environ.get(SUDO_USER)
    return f"{through} as {user}" if through else user


def open_authority(folder: Path, passphrase_file: Path | None) -> Authority:
    """Return the authority; its passphrase is asked for only when it is needed.

    Raises:
        IdentityError: It cannot be used.
    """
    return Authority.open(
        folder,
        actor=operator(),
        passphrase=lambda: _given(passphrase_file) or _ask("Passphrase of the authority's key"),
    )


def new_passphrase(passphrase_file: Path | None, *, encrypt: bool) -> bytes | None:
    """Return the passphrase for a new key, None for a key that is not encrypted.

    Raises:
        CommandError: There is nobody to ask.
        IdentityError: The file cannot be read.
    """
    return _given(passphrase_file) or (_ask("New passphrase", confirm=True) if encrypt else None)


def broker_access(
    known: BrokerAccess,
    *,
    host: str | None,
    port: int | None,
    crl: Path | None,
    pid_file: Path | None,
    unit: str | None,
) -> BrokerAccess:
    """Return how the broker is reached: what is known, with what is given in its place.

    Raises:
        CommandError: What is given cannot be so.
    """
    given: dict[str, object] = {} if pid_file is None and unit is None else {"pid_file": pid_file, "unit": unit}
    if host is not None:
        given["host"] = host
    if port is not None:
        given["port"] = port
    if crl is not None:
        given["crl"] = crl
    try:
        return BrokerAccess.model_validate({**known.model_dump(), **given})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"--{name}: ".replace("_", "-") for name in field_at(BrokerAccess, first))
        raise CommandError(f"The broker cannot be reached like that: {where}{plain_sentence(first)}.") from error


def _given(passphrase_file: Path | None) -> bytes | None:
    if passphrase_file is not None:
        content = read_bounded(passphrase_file, "The passphrase file").strip()
        if not content:
            raise IdentityError(f"The passphrase file {passphrase_file} is empty.")
        return content
    return os.environ.get(PASSPHRASE_VARIABLE, "").encode() or None


def _ask(prompt: str, *, confirm: bool = False) -> bytes:
    if not sys.stdin.isatty():
        raise CommandError(
            f"The authority's key has a passphrase and there is nobody to ask: use --passphrase-file or "
            f"{PASSPHRASE_VARIABLE}."
        )
    answer: str = typer.prompt(prompt, hide_input=True, confirmation_prompt=confirm, err=True)
    return answer.encode()
