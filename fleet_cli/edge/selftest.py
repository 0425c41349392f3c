"""`fleet edge selftest`: what a rollout of an edge gates on."""

from typing import Annotated, Final

import typer

from fleet_cli.checks import ignore_check, show_check
from fleet_cli.errors import CommandError, ExitCode
from fleet_cli.settings_flags import with_settings
from fleet_common.identity.certificates import probe_name
from fleet_common.mqtt.tls import certificate_name
from fleet_device.checks.edge_check import CheckedEdge, EdgeCheck
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.registry import check_target_files, read_target_tokens
from schemas.printable import json_text

# The identity among them is the probe's.
_FLAGS: Final = (
    "fleet", "edge", "target", "broker.host", "broker.port", "broker.ca", "broker.certificate", "broker.key",
)  # fmt: skip


@with_settings(EdgeSettings, only=_FLAGS)
def selftest_command(
    settings: EdgeSettings,
    *,
    probe: Annotated[str | None, typer.Option(help="Device as which to ask; probe-<edge> by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Have the edge that runs verify drafts whose verdict is known, asked through the broker as a device would.

    It disturbs nothing: the edge goes on with its work. Exit code 0 if all is well, 1 if a check failed, 2 if the
    configuration cannot be read. Over TLS it needs an identity of its own, of the role device, given as --certificate
    and --key, and says how to make one.
    """
    name = probe or probe_name(settings.edge)
    _check_identity(name, settings)
    check_target_files(settings)  # before transformers is imported, which takes seconds
    question = CheckedEdge(
        fleet=settings.fleet,
        edge=settings.edge,
        name=name,
        broker=settings.broker,
        tokens=read_target_tokens(settings),
    )
    report = EdgeCheck(question, on_check=ignore_check if as_json else show_check).run()
    if as_json:
        print(json_text(report.json(), indent=2))
    if not report.ok:
        raise typer.Exit(ExitCode.CHECK_FAILED)


def _check_identity(name: str, settings: EdgeSettings) -> None:
    """Refuse to ask under a name that is in use: a broker ends the older of two connections of one name.

    Raises:
        CommandError: The certificate, or without one the name, is the edge's own, or another's.
    """
    certificate = settings.broker.certificate
    found = certificate_name(certificate)
    if found == settings.edge:
        ours = probe_name(settings.edge) if name == settings.edge else name
        raise CommandError(
            f"The certificate {certificate} is the edge's own, which would throw the running edge off the broker: "
            f"make one for the self-test with `fleet edge enroll {ours}`, and give it with --certificate and --key."
        )
    if found is not None and found != name:
        raise CommandError(
            f"The certificate {certificate} is that of {found!r}, and the self-test asks as {name!r}: "
            f"give the certificate of {name!r}, or --probe {found}."
        )
    if name == settings.edge:
        raise CommandError(
            f"Asking as {name!r} would throw the running edge of that name off the broker: leave --probe out, or "
            "give another name."
        )
