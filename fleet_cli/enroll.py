"""`fleet device enroll`, and `fleet edge enroll` for an edge's probe: a key and a request out, a certificate in."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fleet_cli.errors import CommandError
from fleet_cli.tables import print_json
from fleet_common.identity.authority import utc_now
from fleet_common.identity.enrolment import Enrolment

DEFAULT_FOLDER = Path("credentials")


def register(app: typer.Typer) -> None:
    """Add the command to a group."""
    app.command("enroll")(enroll_command)


def enroll_command(
    context: typer.Context,
    device: Annotated[str, typer.Argument(help="This device's name.")],
    *,
    folder: Annotated[Path, typer.Option(help="Where key and certificate lie.")] = DEFAULT_FOLDER,
    certificate: Annotated[Path | None, typer.Option(help="What the operator sent: the signed certificate.")] = None,
    ca: Annotated[Path | None, typer.Option(help="And the authority's, the first time.")] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Ask for a certificate over a new key.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask to join a fleet: first alone, then with the --certificate and --ca that came back."""
    enrolment = Enrolment(folder, device, utc_now)
    if certificate is None:
        if ca is not None:
            raise CommandError("The authority's certificate comes with the device's own: give --certificate too.")
        _show_request(enrolment.ask(fresh=new_key), device, command=context.command_path, as_json=as_json)
        return
    if new_key:
        raise CommandError("A new key needs a new request: run the command without --certificate first.")
    signed = enrolment.take(certificate, ca)
    # At an edge's machine it is the probe that enrols: the edge itself gets its files from the operator.
    probes = context.parent is not None and context.parent.info_name == "edge"
    _show_taken(enrolment, signed, probes=probes, as_json=as_json)


def _show_request(request: Path, device: str, *, command: str, as_json: bool) -> None:
    if as_json:
        print_json({"device": device, "request": str(request)})
        return
    print(f"The request is in {request}; the key stays here. Have the operator sign it:")
    print(f"  fleet broker sign {device} {request.name}")
    print("Then come back with what he sends:")
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
