"""Commands on identities: `fleet broker ca | issue | sign | renew | revoke | list …`, and enrolment of devices."""

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Final

import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from pydantic import ValidationError

from fleet_cli.commands import CommandError
from fleet_cli.options import (
    DEFAULT_DB,
    PASSPHRASE_VARIABLE,
    Database,
    PassphraseFile,
    actor_of,
    end_as_interrupted,
    operator,
    steering_log,
    with_options,
)
from fleet_cli.tables import Column, print_json, print_table
from fleet_common.identity.authority import Authority, create_authority, issue, utc_now
from fleet_common.identity.certificates import AccessAction, AccessChange, IdentityRole, load_request
from fleet_common.identity.enforcement import AccessProof, BrokerAccess, enforce_change
from fleet_common.identity.enrolment import Enrolment
from fleet_common.identity.files import PUBLIC, CutOffFailed, IdentityError, make_folder, read_bounded, write_atomically
from fleet_common.identity.index import CertificateRecord, standing
from fleet_common.validation import field_at, plain_sentence
from schemas.errors import FleetError

CaFolder = Annotated[Path, typer.Option("--ca", envvar="FLEET_CA", help="The authority's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def open_authority(folder: Path, passphrase_file: Path | None) -> Authority:
    """Return the authority; it asks for its passphrase when it needs the key."""
    return Authority.open(
        folder,
        actor=operator(),
        passphrase=lambda: given_passphrase(passphrase_file) or _ask("Passphrase of the authority's key"),
    )


Reach = Mapping[str, object]
"""Options that say how to reach the broker, by field of `BrokerAccess`."""

_REACH: Final[Mapping[str, tuple[object, object]]] = {
    "host": (Annotated[str | None, typer.Option(help="Address of the broker, to end sessions there.")], None),
    "port": (Annotated[int | None, typer.Option(min=1, max=65_535, help="The broker's TLS port.")], None),
    "crl": (Annotated[Path | None, typer.Option(help="File from which the broker reads revoked certificates.")], None),
    "pid_file": (Annotated[Path | None, typer.Option(help="The broker's pid file, to reload it.")], None),
    "unit": (Annotated[str | None, typer.Option(help="The broker's systemd unit, to reload it.")], None),
    "installer": (
        Annotated[
            Path | None,
            typer.Option(help="Program for a broker elsewhere: gets the list's path, copies it there and reloads it."),
        ],
        None,
    ),
}
_with_reach: Final = with_options("reach", _REACH, nullcontext)
_RELOADERS: Final[Mapping[str, None]] = {"pid_file": None, "unit": None, "installer": None}


def broker_access(known: BrokerAccess, given: Reach) -> BrokerAccess:
    """Return the broker access with the given values in place of the known ones."""
    changed = {name: value for name, value in given.items() if value is not None}
    if changed.keys() & _RELOADERS.keys():  # one replaces the other
        changed = {**_RELOADERS, **changed}
    try:
        return BrokerAccess.model_validate(known.model_dump() | changed)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"--{name}: ".replace("_", "-") for name in field_at(BrokerAccess, first))
        raise CommandError(f"The broker cannot be reached like that: {where}{plain_sentence(first)}.") from error


def given_passphrase(passphrase_file: Path | None) -> bytes | None:
    if passphrase_file is not None:
        content = read_bounded(passphrase_file, "The passphrase file").strip()
        if not content:
            raise IdentityError(f"The passphrase file {passphrase_file} is empty.")
        return content
    return os.environ.get(PASSPHRASE_VARIABLE, "").encode() or None


def _ask(prompt: str, *, confirm: bool = False) -> bytes:
    if not sys.stdin.isatty():
        raise CommandError(
            f"The authority's key has a passphrase and there is no terminal to ask on: use --passphrase-file or "
            f"{PASSPHRASE_VARIABLE}."
        )
    answer: str = typer.prompt(prompt, hide_input=True, confirmation_prompt=confirm, err=True)
    return answer.encode()


def _write_signed(
    authority: Authority, entries: Iterable[CertificateRecord], out: Path | None, *, as_json: bool
) -> None:
    folder, ca = out or authority.folder.issued, authority.folder.certificate
    make_folder(folder)
    made = []
    for entry in entries:
        made.append((entry, folder / f"{entry.name}.pem"))
        write_atomically(made[-1][1], entry.pem.encode(), mode=PUBLIC)
    if as_json:
        print_json([_facts(entry, path) | {"ca": str(ca)} for entry, path in made])
        return
    for entry, path in made:
        print(f"The {entry.role} {entry.name} is valid until {entry.not_after:%Y-%m-%d}: {path}")
    print(f"Send it there, the first time together with {ca}." if made else "No certificate is due.")


_STANDING: Final[list[Column[CertificateRecord]]] = [
    Column("name", "name", rank=0),
    Column("role", "role.value", "state", rank=0),
    Column("state", "state.value", "state", rank=0),
    Column("left", "days_left", "days", rank=0),
    Column("until", "not_after", "moment", rank=1),
    Column("by", "by", rank=2, meaning="Who signed it."),
    Column("serial", "serial", "id", rank=2),
]


def _facts(entry: CertificateRecord, path: Path) -> dict[str, object]:
    return {
        "name": entry.name,
        "role": entry.role.value,
        "serial": entry.serial,
        "hosts": list(entry.hosts),
        "not_before": entry.not_before,
        "not_after": entry.not_after,
        "certificate": str(path),
    }


DEFAULT_CA = Path("ca")

Name = Annotated[str, typer.Argument(help="The identity's name.")]
Names = Annotated[list[str] | None, typer.Argument(help="The identities' names.")]
Role = Annotated[IdentityRole, typer.Option(help="What the identity is for.")]
Hosts = Annotated[list[str] | None, typer.Option("--host", help="For a broker: its host name or address.")]
Request = Annotated[Path, typer.Argument(help="The signing request (PEM).")]
Out = Annotated[Path | None, typer.Option(help="Folder for the created files; by default in the authority's folder.")]


def register(app: typer.Typer) -> None:
    app.command("ca")(ca_command)
    app.command("issue")(issue_command)
    app.command("sign")(sign_command)
    app.command("renew")(renew_command)
    for action, meaning in _HELP.items():
        app.command(action.value, help=meaning)(_access_command(action))
    app.command("enforce")(enforce_command)
    app.command("list")(list_command)


@_with_reach
def ca_command(
    *,
    ca: CaFolder = DEFAULT_CA,
    fleet: Annotated[str, typer.Option(help="The fleet's name.")] = "home",
    edge: Annotated[list[str] | None, typer.Option(help="Name to reserve for an edge.")] = None,
    monitor: Annotated[list[str] | None, typer.Option(help="Name to reserve for a monitor.")] = None,
    encrypt: Annotated[bool, typer.Option(help="Protect the authority's key with a passphrase.")] = False,
    passphrase_file: PassphraseFile = None,
    reach: Reach,
    as_json: AsJson = False,
) -> None:
    """Create the fleet's certificate authority. It remembers how to reach the broker for revocations."""
    access = broker_access(BrokerAccess(), reach)
    kept = [(name, IdentityRole.EDGE) for name in edge or []] + [(name, IdentityRole.MONITOR) for name in monitor or []]
    passphrase = given_passphrase(passphrase_file) or (_ask("New passphrase", confirm=True) if encrypt else None)
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
        raise CommandError("Give --host for a broker, once for each of its names, and for no other role.")
    authority = open_authority(ca, passphrase_file)
    made = issue(authority, name, role=role, hosts=hosts or (), folder=out or authority.folder.issued)
    if as_json:
        print_json(_facts(made.entry, made.certificate) | {"key": str(made.key), "ca": str(made.ca)})
        return
    print(f"The {made.entry.role} {made.entry.name} is valid until {made.entry.not_after:%Y-%m-%d}:")
    print(f"  ca = {made.ca}\n  certificate = {made.certificate}\n  key = {made.key}")


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
    """Sign an identity's certificate request, and print which files to send back."""
    authority = open_authority(ca, passphrase_file)
    entry = authority.sign(load_request(request), name=name, role=role, hosts=hosts or ())
    _write_signed(authority, [entry], out, as_json=as_json)


def renew_command(
    names: Names = None,
    *,
    due: Annotated[bool, typer.Option(help="All certificates that expire within 30 days.")] = False,
    early: Annotated[bool, typer.Option(help="Renew even with more than 30 days left.")] = False,
    request: Annotated[Path | None, typer.Option(help="Request with a new key; for one name only.")] = None,
    out: Out = None,
    ca: CaFolder = DEFAULT_CA,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Renew certificates. The key stays unless there is a request, so only the certificate has to be copied."""
    authority = open_authority(ca, passphrase_file)
    if bool(names) == due:
        raise CommandError("Name the identities to renew, or use --due for all that expire soon.")
    wanted = tuple(names or ()) or authority.due()
    if request is not None and len(wanted) != 1:
        raise CommandError("A request is for one name: give that name alone.")
    new_keys = load_request(request) if request else None
    entries = (authority.renew(name, request=new_keys, early=early) for name in wanted)
    _write_signed(authority, entries, out, as_json=as_json)


_HELP: Final = {
    AccessAction.DISCONNECT: "End the sessions of these names at the broker. They may connect again at once.",
    AccessAction.SUSPEND: "Have the broker refuse these names until lifted, and end their sessions. May be repeated.",
    AccessAction.UNSUSPEND: "Lift a suspension: the broker accepts the same certificates again.",
    AccessAction.REVOKE: "Revoke all certificates of these names, notify the broker, and end their sessions. May be "
    "repeated.",
}


_UNNOTIFIED: Final = (
    "No broker was notified: copy the list to it and reload it. Connected clients stay connected; to end their "
    "sessions, repeat the command with --host."
)


def _access_command(action: AccessAction) -> Callable[..., None]:
    @_with_reach
    def change_access(
        names: Annotated[list[str], typer.Argument(help="The identities' names.")],
        *,
        reach: Reach,
        ca: CaFolder = DEFAULT_CA,
        passphrase_file: PassphraseFile = None,
        db: Annotated[
            str | None, typer.Option("--db", envvar="FLEET_DB", help="Session log that records it as an event.")
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        authority = open_authority(ca, passphrase_file)
        path = authority.folder.broker
        access = broker_access(BrokerAccess.load(path), reach)
        if action is AccessAction.DISCONNECT and access.host is None:
            raise CommandError("Only the broker can disconnect a client: give its address with --host.")
        wanted = tuple(dict.fromkeys(names))
        change = authority.change_access(action, wanted)
        try:
            done = enforce_change(change, access)
        except IdentityError as error:
            failed = _not_in_force(change, authority, error)
            _record(db, action, wanted, "failed", str(failed))
            raise failed from error
        access.save(path)  # not before: the next command relies on it
        if done is None:
            _record(db, action, wanted, "recorded", "No broker was notified.")
        else:
            _record(db, action, wanted, "done", done.sentence(action))
        if as_json:
            print_json(_change_facts(change, authority, done))
            return
        if change.revocation_list is not None:
            count = len(change.serials)
            what = f"{count} certificate{'s' if count > 1 else ''} of {', '.join(wanted)}"
            print(f"{what}: {action.done}; the list is {authority.folder.revocation_list}.")
        print(done.sentence(action) if done else _UNNOTIFIED)

    return change_access


def _change_facts(change: AccessChange, authority: Authority, done: AccessProof | None) -> dict[str, object]:
    return {
        "serials": change.serials,
        "crl": str(authority.folder.revocation_list),
        "in_force": done is not None,
        "sessions_ended": list(done.ended) if done else [],
        "in_force_s": done.in_force_s if done else None,
        "done_s": done.done_s if done else None,
    }


def _not_in_force(change: AccessChange, authority: Authority, error: IdentityError) -> CutOffFailed:
    why = str(error).rstrip(".")
    if change.revocation_list is None:
        return CutOffFailed(f"Nobody was disconnected: {why}.")
    return CutOffFailed(
        f"The change is recorded in {authority.folder.revocation_list}, but it is not yet in force: {why}. Then repeat "
        "the command with options that reach the broker; until then refused clients may stay connected."
    )


def _record(db: str | None, action: AccessAction, names: Iterable[str], outcome: str, sentence: str) -> None:
    """Record an action in the session log; without the log it is valid too."""
    if db is None:
        return
    try:
        with steering_log(db) as log:
            from fleet_admin.steering.access import record_access

            for name in names:
                record_access(log, action, name, outcome, sentence, actor=actor_of(None))
    except FleetError as error:
        typer.echo(f"fleet: The {action} holds, but the session log does not know of it: {error}", err=True)


@_with_reach
def enforce_command(
    *,
    reach: Reach,
    ca: CaFolder = DEFAULT_CA,
    passphrase_file: PassphraseFile = None,
    db: Database = DEFAULT_DB,
) -> None:
    """Carry out, until Ctrl-C, what dashboards and `fleet admin` request: disconnect, suspend, unsuspend, revoke.

    It runs on the authority's machine, so that no dashboard needs the authority's key. Only devices can be requested.
    """
    end_as_interrupted()
    authority = open_authority(ca, passphrase_file)
    path = authority.folder.broker
    access = broker_access(BrokerAccess.load(path), reach)
    if access.host is None:
        raise CommandError(
            "It has to reach the broker: give --host, and how to reload it (--pid-file, --unit or --installer)."
        )
    with steering_log(db) as log:
        from fleet_admin.steering.access import carry_out_forever

        print(f"Requests in the session log are carried out at {access.host}:{access.port}.", flush=True)
        carry_out_forever(log, authority, access)


def list_command(
    *,
    ca: CaFolder = DEFAULT_CA,
    history: Annotated[bool, typer.Option("--all", help="Include certificates that were replaced.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the identities with status and remaining days."""
    authority = open_authority(ca, None)
    found = standing(authority.entries(), now=authority.clock(), history=history)
    print_table("Identities", _STANDING, found, as_json=as_json, empty="The authority has issued no certificate yet.")


DEFAULT_FOLDER = Path("credentials")


def enroll_command(
    context: typer.Context,
    device: Annotated[str, typer.Argument(help="This device's name.")],
    *,
    folder: Annotated[Path, typer.Option(help="Folder of key and certificate.")] = DEFAULT_FOLDER,
    certificate: Annotated[Path | None, typer.Option(help="The signed certificate from the operator.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The authority's certificate; needed the first time.")] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Request a certificate for a new key.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Enroll in a fleet: first without options, then with the --certificate and --ca that came back."""
    enrolment = Enrolment(folder, device, utc_now)
    if certificate is None:
        if ca is not None:
            raise CommandError("The authority's certificate comes with the device's own: give --certificate too.")
        _show_request(enrolment.ask(fresh=new_key), device, command=context.command_path, as_json=as_json)
        return
    if new_key:
        raise CommandError("A new key needs a new request: run the command without --certificate first.")
    signed = enrolment.install(certificate, ca)
    # On an edge's machine the probe enrols; the edge itself gets its files from the operator.
    probes = context.parent is not None and context.parent.info_name == "edge"
    _show_taken(enrolment, signed, probes=probes, as_json=as_json)


def _show_request(request: Path, device: str, *, command: str, as_json: bool) -> None:
    if as_json:
        print_json({"device": device, "request": str(request)})
        return
    print(f"The request is in {request}; the key stays here. Have the operator sign it:")
    print(f"  fleet broker sign {device} {request.name}")
    print("When the operator has sent the two certificates, run:")
    print(f"  {command} {device} --folder {request.parent} --certificate {device}.pem --ca ca.pem")


def _show_taken(enrolment: Enrolment, signed: x509.Certificate, *, probes: bool, as_json: bool) -> None:
    ca = x509.load_pem_x509_certificate(enrolment.ca.read_bytes())
    fingerprint = ca.fingerprint(hashes.SHA256()).hex()
    paths = {"ca": enrolment.ca, "certificate": enrolment.certificate, "key": enrolment.key}
    settings = {name: str(path.absolute()) for name, path in paths.items()}
    if as_json:
        print_json(
            {"device": enrolment.name, "not_after": signed.not_valid_after_utc, "ca_sha256": fingerprint} | settings
        )
        return
    enrolled = f"{enrolment.name} is enrolled until {signed.not_valid_after_utc:%Y-%m-%d}."
    if probes:
        files = ["--certificate", settings["certificate"], "--key", settings["key"]]
        print(f"{enrolled} The edge's self-test asks with its files, which are not for the edge's configuration:")
        print(f"  {shlex.join(['fleet', 'edge', 'selftest', '--config', 'edge.toml', *files])}")
    else:
        print(f"{enrolled} In its configuration:\n\n[broker]")
        for name, path in settings.items():
            print(f'{name} = "{path}"')
    print(f"\nCompare the authority's fingerprint with the operator's:\n  SHA-256 {fingerprint}")
