"""Command group `fleet device`: a device as a service, one request on the terminal, and checks."""

import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from fleet_cli.commands import CommandError, ExitCode
from fleet_cli.device_chat import EDGE_S, TELLS_WAITS, chat_command, with_sampling
from fleet_cli.identities import enroll_command
from fleet_cli.options import ends_with_reader, on_interrupt, run_checks, with_events, with_settings
from fleet_cli.tables import Column, print_table
from fleet_common.host import Systemd, locked
from fleet_common.logs import Event, EventStream, hold_back_repetition, write_log_as
from fleet_common.mqtt.settings import TlsSettings
from fleet_device.applications import Application, ApplicationsFile, new_key
from fleet_device.checks.doctor import Doctor
from fleet_device.device import Device, preflight
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.model_file import load_drafter
from fleet_device.gateway import Asked, Gateway
from fleet_device.requests.generate import GeneratedText
from fleet_device.requests.prompt import TextOptions, prepare_request
from fleet_device.service import DeviceService
from fleet_device.session.sequence import TokenOrigin
from fleet_device.settings import DeviceSettings, OfflinePolicy
from fleet_device.steering.commands import LogTail
from fleet_device.steering.remote_settings import SteeredSettings, load_steered
from schemas.policy import MAX_GRAMMAR_BYTES, Grammar
from schemas.printable import json_text, printable
from schemas.reasons import EndReason

_log = logging.getLogger(__name__)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
applications = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(applications, name="app", help="Applications that may use the local API: their keys and quotas.")


@app.command("run")
@with_events(outlives_reader=True)
@with_settings(DeviceSettings)
def run_command(settings: DeviceSettings, *, events: EventStream) -> None:
    """Serve the applications on this device until stopped.

    SIGTERM lets open requests end first; SIGINT and a second SIGTERM do not.
    """
    write_log_as(settings.log_format, fleet=settings.fleet, device=settings.device)
    hold_back_repetition()
    tail = LogTail()
    logging.getLogger().addHandler(tail)
    unit, watched = Systemd.from_environment(), list[Gateway]()
    unit.watch(lambda: [each.health() for each in watched])
    try:
        while _run_once(settings, tail, unit=unit, watched=watched, events=events):
            events.write(Event.STOPPED)
    finally:
        unit.close()
        logging.getLogger().removeHandler(tail)
    events.write(Event.STOPPED)


def _run_once(
    own: DeviceSettings, tail: LogTail, *, unit: Systemd, watched: list[Gateway], events: EventStream
) -> bool:
    """Serve until the end; return whether an administrator has requested a reload."""
    remote = SteeredSettings.of(own)

    def load(settings: DeviceSettings) -> Drafter:
        preflight(settings, serves=True)
        events.write(Event.LOADING, model=settings.model)
        return load_drafter(settings)

    drafter = load_steered(remote, load)
    settings = remote.settings
    service = DeviceService(settings, drafter)
    broker = settings.broker

    def tell_connection(up: bool) -> None:
        if up:
            events.write(Event.ONLINE, host=broker.host, port=broker.port)
        else:
            events.write(Event.OFFLINE)

    service.link.on_connection(tell_connection)
    gateway = Gateway(service, remote=remote, log_tail=tail)
    signal.signal(signal.SIGINT, lambda *_: gateway.request_end(Asked.STOP))
    signal.signal(signal.SIGTERM, lambda *_: gateway.request_end(Asked.DRAIN))
    try:
        gateway.start()
        served = gateway.address or "no API"
        events.write(
            Event.SERVING, fleet=settings.fleet, device=settings.device, model=service.drafter.name, api=gateway.address
        )
        sentence = (
            f"Device {settings.device} of fleet {settings.fleet}, draft model {service.drafter.name}, "
            f"broker {broker.host}:{broker.port}: {served}."
        )
        if settings.log_format == "json":
            _log.info(sentence)
        elif not events:
            print(sentence, file=sys.stderr, flush=True)
        unit.ready(f"Device {settings.device} of fleet {settings.fleet}: {served}.")
        watched[:] = [gateway]
        gateway.run(
            on_end=lambda: None if gateway.reloads else unit.stopping(),
            on_drain=lambda requests: events.write(Event.DRAINING, requests=requests),
        )
    finally:
        gateway.stop()
        # Until the next service runs, a signal ends the process, as before the first.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return gateway.reloads


Show = Callable[..., None]  # takes an event and its fields


@app.command("generate")
@with_events(outlives_reader=False)
@with_settings(DeviceSettings)
@with_sampling
def generate_command(
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads standard input.")],
    settings: DeviceSettings,
    sampling: TextOptions,
    *,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this string; repeatable.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompt.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print statistics and the plan to standard error.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    json_schema: Annotated[Path | None, typer.Option(help="File with a JSON schema for the output.")] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression that the whole output matches.")] = None,
    lark: Annotated[Path | None, typer.Option(help="File with a Lark grammar for the output.")] = None,
    events: EventStream,
) -> None:
    """Generate one output. Ctrl-C ends it early."""
    if stop and not all(stop):
        raise CommandError("--stop is empty; give the string before which the output ends.")
    grammar = read_grammar(json_schema=json_schema, regex=regex, lark=lark)
    asked = _read_prompt(prompt)
    options: TextOptions = {**sampling, "raw": raw, "stop": tuple(stop or ()), "grammar": grammar}
    prepare_request(asked, settings, **options)  # before the model is loaded
    show: Show = events.write if events else _silent if as_json else _print
    with ends_with_reader():
        events.write(Event.LOADING, model=settings.model)
        text, vocabulary = _write(settings, asked, options, show=show)
        result = _result(settings.device, vocabulary, text)
        if events:
            events.write(Event.END, **result)
        elif as_json:
            print(json_text(result, indent=2))
        else:
            print()
            print(_summary(result), file=sys.stderr)
            if stats:
                print(_stats(result), file=sys.stderr)
        sys.stdout.flush()
    if text.reason is EndReason.CANCELLED:
        raise typer.Exit(ExitCode.INTERRUPTED)


def _write(settings: DeviceSettings, asked: str, options: TextOptions, *, show: Show) -> tuple[GeneratedText, int]:
    with (
        Device(settings) as device,
        device.stream(asked, **options) as stream,
        on_interrupt(at_first(stream.cancel)),
    ):
        stream.on_wait = lambda reason: show(Event.WAITING, reason=reason)
        logging.getLogger(TELLS_WAITS).setLevel(logging.ERROR)  # `show` reports waits
        if settings.offline is OfflinePolicy.WAIT and not device.wait_for_edge(EDGE_S):
            _say(f"No edge of fleet {settings.fleet!r} is online; waiting for one …")
        request = stream.request()
        show(Event.START, prompt_tokens=len(request.prompt), seed=request.policy.seed)
        for piece in stream.pieces():
            show(Event.TOKENS, number=piece.tokens, text=piece.text)
        return stream.result(), device.drafter.vocabulary.size


def at_first(action: Callable[[], None]) -> Callable[[int, object], None]:
    """Return a handler of Ctrl-C that calls `action`; the second Ctrl-C has Python's default effect."""

    def handle(_signal: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        action()

    return handle


def _read_prompt(prompt: str) -> str:
    text = sys.stdin.buffer.read().decode("utf-8", "replace") if prompt == "-" else prompt
    if not text.strip():
        where = "Standard input" if prompt == "-" else "The prompt"
        raise CommandError(f"{where} is empty; give a prompt.")
    return text


def _result(device: str, vocabulary: int, text: GeneratedText) -> dict[str, Any]:
    generation = text.generation
    counters, closed = generation.counters, generation.closed
    tokens, choice = len(generation.tokens), generation.choice
    return {
        "device": device,
        "session": generation.session.hex(),
        "seed": text.request.policy.seed,
        "vocabulary": vocabulary,
        "prompt_tokens": len(text.request.prompt),
        "tokens": tokens,
        "finish": text.reason.value,
        "wall_s": generation.wall_ms / 1e3,
        "first_token_s": None if generation.first_ms is None else generation.first_ms / 1e3,
        "tokens_per_s": tokens / (generation.wall_ms / 1e3) if generation.wall_ms else 0.0,
        "plan": choice and choice.plan,
        "plan_reason": choice and choice.reason,
        "plan_settled": choice and choice.settled,
        "verified": text.verified,
        "unverified": text.unverified,
        "target_id": generation.target_id and generation.target_id.hex(),
        "edge_only": counters.edge_only,
        "forced": text.origins.count(TokenOrigin.FORCED),
        "acceptance": counters.acceptance,
        "rounds": counters.rounds,
        "mean_draft": generation.mean_draft,
        "drafted": counters.drafted,
        "tested": counters.tested,
        "accepted": counters.accepted,
        "suffix_drafted": counters.suffix_drafted,
        "suffix_tested": counters.suffix_tested,
        "suffix_accepted": counters.suffix_accepted,
        "uplink_bytes": counters.uplink_bytes,
        "downlink_bytes": counters.downlink_bytes,
        "joules": generation.joules,
        "draft_ms": counters.draft_ms,
        "wait_ms": counters.wait_ms,
        "mean_batch": closed.mean_batch if closed else None,
        "edge_queue_ms": closed.queue_ms if closed else None,
        "edge_compute_ms": closed.compute_ms if closed else None,
        "resumes": generation.resumes,
        "text": text.text,
    }


def _summary(result: dict[str, Any]) -> str:
    acceptance = "none" if result["acceptance"] is None else f"{result['acceptance']:.2f}"
    mean_draft = "" if result["mean_draft"] is None else f" of {result['mean_draft']:.1f} tokens"
    unverified = f"{result['unverified']} of them UNVERIFIED, " if result["unverified"] else ""
    return (
        f"[{result['tokens']} tokens, {unverified} {result['tokens_per_s']:.1f} tokens/s, acceptance {acceptance}, "
        f"{result['rounds']} rounds{mean_draft}, {result['uplink_bytes']} bytes up, {result['downlink_bytes']} down, "
        f"ended by {result['finish']}, session {result['session']}]"
    )


def _stats(result: dict[str, Any]) -> str:
    first_s = "none" if result["first_token_s"] is None else f"{result['first_token_s']:.2f} s"
    drafted = max(0, result["tokens"] - result["edge_only"] - result["unverified"])
    settled = "" if result["plan_settled"] else ", not settled yet"
    joules, tokens = result["joules"], max(1, result["tokens"])
    energy = "" if joules is None else f"; {joules:.1f} J, {joules / tokens:.2f} J a token"
    return "\n".join(
        (
            f"  plan at the end   {result['plan']}{settled}: {result['plan_reason']}",
            f"  tokens            {result['edge_only']} edge-only, {drafted} by way of drafts",
            f"  unverified        {result['unverified']} tokens, without an edge, by another target, or behind such",
            f"  drafted           {result['drafted']} tokens; {result['tested']} tested, {result['accepted']} accepted",
            f"  from earlier text {result['suffix_drafted']} of these; {result['suffix_tested']} tested, "  # noqa: ISC004
            f"{result['suffix_accepted']} accepted",
            f"  first token       after {first_s}",
            f"  draft model       {result['draft_ms']:.0f} ms; waiting {result['wait_ms']:.0f} ms{energy}",
        )
    )


def _print(_event: Event, *, text: str = "", reason: str | None = None, **_: object) -> None:
    if reason is not None:
        _say(f"Waiting: {reason}")
    # A program that reads the output gets it unchanged.
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def _silent(_event: Event, *, reason: str | None = None, **_: object) -> None:
    if reason is not None:
        _say(f"Waiting: {reason}")


def _say(sentence: str) -> None:
    print(printable(sentence), file=sys.stderr, flush=True)


def read_grammar(*, json_schema: Path | None, regex: str | None, lark: Path | None) -> Grammar | None:
    """Return the grammar of the flags; raises `CommandError` if several are given or a file is unusable."""
    given = [name for name, value in (("json-schema", json_schema), ("regex", regex), ("lark", lark)) if value]
    if len(given) > 1:
        raise CommandError(f"--{given[0]} and --{given[1]} go not together; give one of them.")
    try:
        if json_schema is not None:
            return Grammar.json_schema(json.loads(_read(json_schema)))
        if lark is not None:
            return Grammar.lark(_read(lark))
        return Grammar.regex(regex) if regex else None
    except json.JSONDecodeError as error:
        raise CommandError(f"{json_schema} is not JSON: {error}.") from None
    except (ValidationError, RecursionError):
        raise CommandError(f"The grammar has more than {MAX_GRAMMAR_BYTES} bytes, or cannot be read.") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8"
        raise CommandError(f"The file {path} cannot be read: {reason}.") from None


@app.command("doctor")
@with_settings(DeviceSettings)
def doctor_command(
    settings: DeviceSettings,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Check this machine, the model, the way to the broker, the edge and a real request, and say what to do.

    Exit code 0 if all is well, 1 if a check failed, 2 if the configuration is invalid. If the device runs as a service,
    the doctor asks it instead of the broker.
    """
    run_checks(lambda on_check: Doctor(settings, on_check).run(), as_json=as_json, device=settings.device)


_Name = Annotated[str, typer.Argument(help="Name of the application in the session log and in errors.")]
_Tokens = Annotated[int | None, typer.Option(help="Maximum tokens of prompts and outputs; by default no limit.", min=1)]
_Requests = Annotated[
    int | None, typer.Option(help="Maximum number of requests that run or wait; by default no limit.", min=1)
]


@applications.command("add")
@with_settings(DeviceSettings, only=("applications",))
def add_command(
    name: _Name,
    settings: DeviceSettings,
    *,
    tokens_per_min: _Tokens = None,
    tokens_per_day: _Tokens = None,
    requests_at_once: _Requests = None,
) -> None:
    """Make a key for an application, and print it. It is not stored, so this is the only time."""
    key, digest = new_key()
    with ApplicationsFile(_path(settings)).changing() as known:
        if any(each.name == name for each in known):
            raise CommandError(f"There is an application {name!r} already; remove it first, which ends its key.")
        try:
            added = Application(
                name=name,
                sha256=digest,
                tokens_per_min=tokens_per_min,
                tokens_per_day=tokens_per_day,
                requests_at_once=requests_at_once,
            )
        except ValidationError as error:
            if error.errors()[0]["loc"] != ("name",):
                raise CommandError("A quota is too large: give a smaller number.") from error
            raise CommandError(
                f"{name!r} is no name for an application: it has up to 40 letters, digits, dots, hyphens and "
                "underscores, and begins with a letter or a digit."
            ) from error
        known.append(added)
    print(key)


@applications.command("list")
@with_settings(DeviceSettings, only=("applications",))
def list_command(settings: DeviceSettings) -> None:
    """List the applications and their quotas."""
    columns: list[Column[Application]] = [
        Column("application", lambda each: each.name, rank=0),
        Column("tokens/min", lambda each: each.tokens_per_min, "count"),
        Column("tokens/day", lambda each: each.tokens_per_day, "count"),
        Column("requests at once", lambda each: each.requests_at_once, "count"),
    ]
    found = ApplicationsFile(_path(settings)).read().applications
    print_table("Applications", columns, found, empty="There are none; `fleet device app add NAME` adds one.")


@applications.command("remove")
@with_settings(DeviceSettings, only=("applications",))
def remove_command(name: _Name, settings: DeviceSettings) -> None:
    """Revoke the key of an application; a running device refuses it at once."""
    with ApplicationsFile(_path(settings)).changing() as known:
        kept = [each for each in known if each.name != name]
        if len(kept) == len(known):
            raise CommandError(f"There is no application {name!r}; `fleet device app list` shows those that there are.")
        known[:] = kept
    print(f"The key of {name} is not valid any more.")


def _path(settings: DeviceSettings) -> Path:
    if settings.applications is None:
        raise CommandError("Name the file of the applications: --applications, or `applications` in the configuration.")
    return settings.applications.expanduser()


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


app.command("chat")(chat_command)
app.command("update")(update_command)
app.command("enroll")(enroll_command)
