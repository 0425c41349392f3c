"""`fleet broker ca | issue | sign | renew | revoke | list`: who may speak through the broker."""

from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives import hashes

from fleet_cli.admin.options import open_log
from fleet_cli.broker.identity_options import (
    AsJson,
    CaFolder,
    Crl,
    Host,
    PassphraseFile,
    PidFile,
    Port,
    Unit,
    broker_access,
    new_passphrase,
    open_authority,
    operator,
)
from fleet_cli.broker.identity_reports import show_issued, show_revoked, show_signed, show_standings
from fleet_cli.errors import CommandError
from fleet_cli.tables import print_json
from fleet_common.identity.authority import create_authority, issue
from fleet_common.identity.certificates import IdentityRole, load_request
from fleet_common.identity.enforcement import BrokerAccess, enforce_revocation
from fleet_common.identity.files import PUBLIC, make_folder, write_atomically
from fleet_common.identity.index import certificate_statuses
from schemas.errors import FleetError

DEFAULT_CA = Path("ca")

Name = Annotated[str, typer.Argument(help="The identity's name.")]
Names = Annotated[list[str] | None, typer.Argument(help="The identities' names.")]
Role = Annotated[IdentityRole, typer.Option(help="What the identity is for.")]
Hosts = Annotated[list[str] | None, typer.Option("--host", help="For a broker: a host name or address of it.")]
Request = Annotated[Path, typer.Argument(help="The signing request (PEM).")]
Out = Annotated[Path | None, typer.Option(help="Folder for what is made; by default in the authority's folder.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `fleet broker`."""
    app.command("ca")(ca_command)
    app.command("issue")(issue_command)
    app.command("sign")(sign_command)
    app.command("renew")(renew_command)
    app.command("revoke")(revoke_command)
    app.command("list")(list_command)


def ca_command(
    *,
    ca: CaFolder = DEFAULT_CA,
    fleet: Annotated[str, typer.Option(help="The fleet's name.")] = "home",
    edge: Annotated[list[str] | None, typer.Option(help="A name to keep for an edge.")] = None,
    monitor: Annotated[list[str] | None, typer.Option(help="A name to keep for a monitor.")] = None,
    encrypt: Annotated[bool, typer.Option(help="Protect the authority's key with a passphrase.")] = False,
    passphrase_file: PassphraseFile = None,
    host: Host = None,
    port: Port = None,
    crl: Crl = None,
    pid_file: PidFile = None,
    unit: Unit = None,
    as_json: AsJson = False,
) -> None:
    """Found the fleet's certificate authority. How the broker is reached is remembered for revocations."""
    access = broker_access(BrokerAccess(), host=host, port=port, crl=crl, pid_file=pid_file, unit=unit)
    kept = [(name, IdentityRole.EDGE) for name in edge or []] + [(name, IdentityRole.MONITOR) for name in monitor or []]
    passphrase = new_passphrase(passphrase_file, encrypt=encrypt)
    made = create_authority(ca, fleet=fleet, actor=operator(), kept=kept, passphrase=passphrase)
    access.save(made.folder.broker)
    fingerprint = made.certificate.fingerprint(hashes.SHA256()).hex()
    if as_json:
        print_json(
            {"fleet": fleet, "ca": str(made.folder.certificate), "crl": str(made.folder.revocation_list)}
            | {"sha256": fingerprint, "not_after": made.certificate.not_valid_after_utc, "encrypted": bool(passphrase)}
        )
        return
    print(
        f"The authority of the fleet {fleet} is in {ca}; keep {made.folder.key} secret and a copy of the folder safe."
    )
    print(f"Its certificate, for everybody: {made.folder.certificate}\n  SHA-256 {fingerprint}")


def issue_command(
    name: Name,
    *,
    role: Role,
    hosts: Hosts = None,
    out: Out = None,
    ca: CaFolder = DEFAULT_CA,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Make key and certificate here, for an edge, a monitor or a broker. A device makes its own key: see `sign`."""
    if role is IdentityRole.DEVICE:
        raise CommandError(
            "A device's key never leaves it: run `fleet device enroll` there, and `fleet broker sign` here."
        )
    if (role is IdentityRole.BROKER) != bool(hosts):
        raise CommandError("Give --host for a broker, as often as it has names, and for nobody else.")
    authority = open_authority(ca, passphrase_file)
    made = issue(authority, name, role=role, hosts=hosts or (), folder=out or authority.folder.issued)
    show_issued(made, as_json=as_json)


def sign_command(
    name: Name,
    request: Request,
    *,
    role: Role = IdentityRole.DEVICE,
    hosts: Hosts = None,
    out: Out = None,
    ca: CaFolder = DEFAULT_CA,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Sign a request for NAME; send back the certificate and the authority's own."""
    authority = open_authority(ca, passphrase_file)
    folder = out or authority.folder.issued
    make_folder(folder)
    entry = authority.sign(load_request(request), name=name, role=role, hosts=hosts or ())
    path = folder / f"{entry.name}.pem"
    write_atomically(path, entry.pem.encode(), mode=PUBLIC)
    show_signed([(entry, path)], ca=authority.folder.certificate, as_json=as_json)


def renew_command(
    names: Names = None,
    *,
    due: Annotated[bool, typer.Option(help="All that end within 30 days.")] = False,
    early: Annotated[bool, typer.Option(help="Also with more than 30 days left.")] = False,
    request: Annotated[Path | None, typer.Option(help="A request with a new key, for one name.")] = None,
    out: Out = None,
    ca: CaFolder = DEFAULT_CA,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Sign a new period. The key stays unless there is a request, so only the certificate has to travel."""
    authority = open_authority(ca, passphrase_file)
    if bool(names) == due:
        raise CommandError("Say whom to renew, or --due for all whose time has come.")
    wanted = tuple(names or ()) or authority.due()
    if request is not None and len(wanted) != 1:
        raise CommandError("A request is for one name: give that name alone.")
    folder = out or authority.folder.issued
    make_folder(folder)
    made = []
    for name in wanted:
        entry = authority.renew(name, request=load_request(request) if request else None, early=early)
        path = folder / f"{entry.name}.pem"
        write_atomically(path, entry.pem.encode(), mode=PUBLIC)
        made.append((entry, path))
    show_signed(made, ca=authority.folder.certificate, as_json=as_json)


def revoke_command(
    names: Annotated[list[str], typer.Argument(help="The identities' names.")],
    *,
    host: Host = None,
    port: Port = None,
    crl: Crl = None,
    pid_file: PidFile = None,
    unit: Unit = None,
    ca: CaFolder = DEFAULT_CA,
    passphrase_file: PassphraseFile = None,
    db: Annotated[
        str | None, typer.Option("--db", envvar="FLEET_DB", help="Session log that is told of it, as an event.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Revoke all certificates of these names, tell the broker, and end their sessions. May be said again."""
    authority = open_authority(ca, passphrase_file)
    path = authority.folder.broker
    access = broker_access(BrokerAccess.load(path), host=host, port=port, crl=crl, pid_file=pid_file, unit=unit)
    access.save(path)
    revocation = authority.revoke(tuple(dict.fromkeys(names)))
    if db is not None:
        _tell_log(db, names)
    show_revoked(
        revocation, enforce_revocation(revocation, access), crl=authority.folder.revocation_list, as_json=as_json
    )


def _tell_log(db: str, names: list[str]) -> None:
    """Write a revocation into the session log; it holds whether the log can be reached or not."""
    try:
        with open_log(db) as log:
            from fleet_edge.store.event_codes import EventKind

            for name in dict.fromkeys(names):
                sentence = f"All certificates of {name} were revoked."
                log.record_event(
                    kind=EventKind.IDENTITY, code="revoked", sentence=sentence, device=name, who=operator()
                )
    except FleetError as error:
        typer.echo(f"fleet: The revocation holds, but the session log does not know of it: {error}", err=True)


def list_command(
    *,
    ca: CaFolder = DEFAULT_CA,
    history: Annotated[bool, typer.Option("--all", help="Also what was replaced by a newer one.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the identities, how they stand and how many days are left."""
    authority = open_authority(ca, None)
    show_standings(certificate_statuses(authority.entries(), now=authority.clock(), history=history), as_json=as_json)
