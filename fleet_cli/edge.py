"""Command group `fleet edge`."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from fleet_cli.edge_advise import advise_command
from fleet_cli.errors import CommandError
from fleet_cli.identities import enroll_command
from fleet_cli.options import run_checks, with_events, with_settings
from fleet_cli.warm_prompts import read_warm_prompts
from fleet_common.grammar.compiler import BANNED_FILE, BannedGrammars
from fleet_common.host import Systemd, use_one_heap
from fleet_common.logs import Event, EventStream, hold_back_repetition, write_log_as
from fleet_common.mqtt.tls import certificate_name
from fleet_common.settings import load_settings
from fleet_edge.edge import Edge
from fleet_edge.session_log import parse_url, shown
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.blocks_engine import kept_pages_path
from fleet_edge.verifiers.registry import check_target_files, read_target_tokens
from schemas.errors import FleetError
from schemas.names import probe_name

_log = logging.getLogger(__name__)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@contextmanager
def edge_dashboard(settings: EdgeSettings) -> Iterator[Callable[[], str]]:
    """Yield a function that starts the dashboard, and stop it at the end.

    Call the function once the edge has made its database; it returns the address, empty without a dashboard. If the
    dashboard cannot start, the edge runs without it.
    """
    if not settings.dashboard:
        yield lambda: ""
        return
    try:
        from fleet_admin.dashboard.app import DashboardServer
        from fleet_admin.dashboard.settings import DashboardSettings
    except ModuleNotFoundError as error:
        raise CommandError(
            f"The setting dashboard needs the package {error.name!r}; install this one with the extra 'dashboard'."
        ) from error
    # Everything but its address comes from its own settings: an edge's identity is not an administrator's.
    flags = {"listen": settings.dashboard, "db": settings.db}
    named = os.environ.get(DashboardSettings.variable_prefix + "CONFIG")
    served = load_settings(DashboardSettings, config=Path(named) if named else None, flags=flags)
    running: list[DashboardServer] = []

    def start() -> str:
        try:
            running.append(DashboardServer(served))
        except FleetError as error:
            _log.error("The edge has no dashboard: %s", error)
            return ""
        return running[0].address

    try:
        yield start
    finally:
        for each in running:
            each.stop()


@app.command("run")
@with_events(outlives_reader=True)
@with_settings(EdgeSettings)
def run_command(settings: EdgeSettings, *, events: EventStream) -> None:
    """Verify the drafts of a fleet until stopped. SIGTERM lets open sessions end first; SIGINT does not.

    A second SIGTERM ends it at once. Open sessions then resume at another edge with the same target model, or here when
    this one is back. SIGUSR1, before another target model is served, waits until all open sessions have ended.
    """
    write_log_as(settings.log_format, fleet=settings.fleet, edge=settings.edge)
    hold_back_repetition()
    use_one_heap()  # before there are threads
    running = Edge(settings, warm_prompts=read_warm_prompts(settings))
    unit = Systemd.from_environment()

    def say(sentence: str) -> None:
        if settings.log_format == "json":
            _log.info(sentence)
        elif not events:
            print(sentence, file=sys.stderr, flush=True)

    def tell() -> None:
        online = (
            f"Edge {settings.edge} of fleet {settings.fleet} is online at {settings.broker.host}:{settings.broker.port}"
        )
        info, database = running.target, shown(parse_url(settings.db))
        events.write(
            Event.ONLINE,
            fleet=settings.fleet,
            edge=settings.edge,
            host=settings.broker.host,
            port=settings.broker.port,
            target=info.name,
            vocabulary=str(info.vocabulary),
            context=info.context,
            runs_on=info.runs_on,
            database=database,
        )
        target = f"target {info.name}, {info.vocabulary}, context {info.context}, on {info.runs_on}"
        say(f"{online}: {target}, sessions in {database}.")
        if address := start_dashboard():
            say(f"Its dashboard is at {address}.")
        unit.ready(f"{online}.")

    with edge_dashboard(settings) as start_dashboard:
        running.check()
        events.write(Event.LOADING, target=settings.target)
        say(f"Loading the target model {settings.target} …")
        handed_over = running.run(
            on_online=tell,
            on_step=unit.alive,
            on_end=unit.stopping,
            on_drain=lambda sessions: events.write(Event.DRAINING, sessions=sessions),
        )
        events.write(Event.STOPPED, handed_over=handed_over)


# The identity among them is the probe's.
_FLAGS: Final = (
    "fleet", "edge", "target", "broker.host", "broker.port", "broker.ca", "broker.certificate", "broker.key",
)  # fmt: skip


@app.command("selftest")
@with_settings(EdgeSettings, only=_FLAGS)
def selftest_command(
    settings: EdgeSettings,
    *,
    probe: Annotated[str | None, typer.Option(help="Device name to use; by default probe-<edge>.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Have the running edge verify drafts with a known verdict, through the broker as a device would.

    The edge continues its work. Exit code 0 if all is well, 1 if a check failed, 2 if the configuration is invalid.
    Over TLS it needs its own identity with the role device, given as --certificate and --key, and says how to make one.
    """
    from fleet_device.checks.edge_check import EdgeCheck  # a device, which a start of an edge need not wait for

    name = probe or probe_name(settings.edge)
    _check_identity(name, settings)
    check_target_files(settings)  # before transformers is imported, which takes seconds
    tokens = read_target_tokens(settings)
    run_checks(
        lambda on_check: EdgeCheck(settings.fleet, settings.edge, name, settings.broker, tokens, on_check).run(),
        as_json=as_json,
        edge=settings.edge,
    )


def _check_identity(name: str, settings: EdgeSettings) -> None:
    """Refuse a name that is in use, because a broker closes the older of two connections with one name."""
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


@app.command("grammars")
@with_settings(EdgeSettings, only=("spool",))
def grammars_command(
    settings: EdgeSettings,
    *,
    lift: Annotated[str | None, typer.Option(help="SHA-256, or its beginning, of a grammar to allow again.")] = None,
) -> None:
    """List the grammars that this edge refuses for a day, because they ended the process that compiled them."""
    banned = BannedGrammars(settings.spool / BANNED_FILE)
    found = banned.until()
    if lift is not None:
        chosen = [digest for digest in found if digest.startswith(lift)]
        if len(chosen) != 1:
            raise CommandError(f"{len(chosen)} banned grammars begin with {lift!r}; the list is `fleet edge grammars`.")
        banned.lift(chosen[0])
        print(f"The grammar {chosen[0]} is allowed again.")
        return
    for digest, until in found.items():
        print(digest, "until", datetime.fromtimestamp(until, UTC).isoformat(timespec="seconds"))
    if not found:
        print("No grammar is banned.")


@app.command("forget-prompts")
@with_settings(EdgeSettings, only=("fleet", "edge", "kv_kept"))
def forget_prompts_command(settings: EdgeSettings) -> None:
    """Delete the prompts and outputs that this edge keeps, in computed form, for its next start.

    A running edge drops those of ended requests when the next request begins, and keeps nothing until it is restarted.
    It computes its warm prompts again.
    """
    path = kept_pages_path(settings)
    if path is None or not path.exists():
        print(f"Edge {settings.edge} of fleet {settings.fleet} keeps no prompts here.")
        return
    path.unlink()
    print(f"{path} is deleted.")


app.command("advise")(advise_command)
app.command("enroll")(enroll_command)
