"""Options that several groups of commands share, and what they open."""

import getpass
import inspect
import os
import signal
import socket
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fleet_cli.commands import CommandError, ExitCode
from fleet_common.checks import Check, CheckStatus
from fleet_common.extras import install_command
from fleet_common.logs import EventStream
from fleet_common.settings import SettingField, Settings, fields_of, load_settings
from fleet_common.validation import read_time
from schemas.names import VERSION
from schemas.printable import json_text, printable_line

if TYPE_CHECKING:
    from fleet_admin.settings import AdminSettings
    from fleet_admin.steering import Actor, Steering, SteeringLog
    from fleet_edge.session_log import SessionLog

Command = Callable[..., None]

PASSPHRASE_VARIABLE: Final = "FLEET_CA_PASSPHRASE"  # noqa: S105 - its name

PassphraseFile = Annotated[
    Path | None,
    typer.Option(help=f"File with the passphrase of the authority's key; or {PASSPHRASE_VARIABLE}, or you are asked."),
]

_COMMON: Final = "Settings"
_RARE: Final = "Settings that are rarely needed"


def with_options(
    name: str,
    options: Mapping[str, tuple[object, object]],
    value: Callable[[dict[str, Any]], AbstractContextManager[object]],
) -> Callable[[Command], Command]:
    """Replace a command's parameter `name` by options, from which `value` makes it while the command runs.

    `options` has the annotation and the default of each option, by its name.
    """

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**given: Any) -> None:  # noqa: ANN401 - options of all types, by name
            with value({option: given.pop(option) for option in options}) as made:
                command(**{name: made}, **given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == name:
                parameters += (
                    inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
                    for option, (annotation, default) in options.items()
                )
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        # Typer reads both.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def with_settings(
    model: type[Settings],
    *,
    only: Collection[str] = (),
    file: Callable[[], Path | None] = lambda: None,
    variables: Mapping[str, str] | None = None,
) -> Callable[[Command], Command]:
    """Give a command its `settings`, with a flag for each setting, or for those named by `only`.

    `file` names the TOML file where `--config` does not. `variables` are environment variables that set a setting, by
    its name, where that of its own is not set.
    """
    known = {each.name: each for each in fields_of(model) if each.flag is not None}
    fields = {"_".join(each.path): each for each in (map(known.__getitem__, only) if only else known.values())}
    config = typer.Option(metavar="PATH", help="TOML file with settings.", envvar=model.variable_prefix + "CONFIG")
    options: dict[str, tuple[object, object]] = {
        "config": (Annotated[Path | None, config], None),
        **{name: (_option(each, (variables or {}).get(name)), None) for name, each in fields.items()},
    }

    def load(given: dict[str, Any]) -> AbstractContextManager[object]:
        flags = _nested({each.path: given[name] for name, each in fields.items()})
        return nullcontext(load_settings(model, config=given["config"] or file(), flags=flags))

    return with_options("settings", options, load)


def _option(field: SettingField, variable: str | None) -> object:
    """Return a setting's option. It takes any string: all settings are checked together."""
    flag = f"{field.flag}/--no-{str(field.flag).removeprefix('--')}" if field.switch else field.flag
    facts = [] if field.metavar != "WORD" or field.switch else [field.kind]
    facts += [f"default {field.default} {field.unit}".strip()] if field.default else []
    info = typer.Option(
        flag,
        envvar=None if variable is None else [field.variable, variable],
        help=field.meaning.replace("`", "") + (f" ({'; '.join(facts)})" if facts else ""),
        metavar="" if field.switch else field.metavar,
        show_default=False,
        rich_help_panel=_RARE if field.rare else _COMMON,
    )
    return Annotated[bool | None if field.switch else str | None, info]


def _nested(flags: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flags.items():
        inner = nested
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    return nested


def with_events(*, outlives_reader: bool) -> Callable[[Command], Command]:
    """Give a command the flag `--events`, and as `events` the stream to write to.

    Errors of users, also those of the settings, become events before they end the program. For `outlives_reader` see
    `EventStream`.
    """
    flag = typer.Option("--events", help="Write what happens as JSON lines to standard output.")

    @contextmanager
    def stream(given: dict[str, Any]) -> Iterator[EventStream]:
        events = EventStream(sys.stdout if given["events"] else None, outlives_reader=outlives_reader)
        with events.reporting_errors():
            yield events

    return with_options("events", {"events": (Annotated[bool, flag], False)}, stream)


def show_check(check: Check) -> None:
    status = "FAILED" if check.status is CheckStatus.FAILED else check.status
    # A message may quote a broker or an edge.
    print(f"{status:<8}{check.name:<15}{printable_line(check.sentence)}", flush=True)


def run_checks(run: Callable[[Callable[[Check], None]], Iterable[Check]], *, as_json: bool, **about: str) -> None:
    """Run a checklist, print a line for each check or one JSON object at the end, and exit if a check has failed."""
    checks = list(run((lambda _check: None) if as_json else show_check))
    ok = all(check.status is not CheckStatus.FAILED for check in checks)
    if as_json:
        body = {"ok": ok, "software": VERSION, **about, "checks": [asdict(check) for check in checks]}
        print(json_text(body, indent=2))
    if not ok:
        raise typer.Exit(ExitCode.CHECK_FAILED)


@contextmanager
def ends_with_reader() -> Iterator[None]:
    """Exit if the reader of standard output has closed the pipe."""
    try:
        yield
    except BrokenPipeError:
        # Python must not try to write the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.READER_GONE) from None


@contextmanager
def on_interrupt(handler: Callable[[int, Any], object] | signal.Handlers) -> Iterator[None]:
    """Have Ctrl-C handled otherwise for a while."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_as_interrupted() -> None:
    """Let SIGTERM and SIGHUP end this program as Ctrl-C does: it then stops the processes that it has started."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)


_PROFILE: Final = "FLEET_ADMIN_CONFIG"


def profile_file() -> Path | None:
    """Return the operator's file of admin settings; None if there is none."""
    if named := os.environ.get(_PROFILE):
        return Path(named)
    usual = Path(typer.get_app_dir("fleet")) / "admin.toml"
    return usual if usual.is_file() else None


def load_profile(config: Path | None = None) -> "AdminSettings":
    from fleet_admin.settings import AdminSettings

    return load_settings(AdminSettings, config=config or profile_file(), flags={})


def _database(context: typer.Context, given: str) -> str:
    # Options that are given, such as --config, are read before those that are not.
    own = [context.params.get(each.name or "") for each in context.command.params if each.envvar == _PROFILE]
    return given or load_profile(*(Path(each) for each in own if each)).db


Database = Annotated[
    str,
    typer.Option(
        "--db",
        envvar="FLEET_DB",
        callback=_database,
        help="sqlite:///PATH or postgresql://USER@HOST/NAME.",
        show_default="the profile's",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
DEFAULT_DB = ""


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Raise a CommandError that names the extra if a package is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CommandError(
            f"The package {error.name!r} is missing; install this one with the extra {name!r}: {install_command(name)}"
        ) from error


def time_of(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return read_time(text, now=datetime.now(UTC))
    except ValueError as error:
        raise CommandError(f"{option}: {error}") from error


def open_log(url: str) -> "SessionLog":
    with needs_extra("admin"):
        from fleet_edge.session_log import SessionLog

    return SessionLog(url)


Acting = Annotated[
    str | None, typer.Option("--as", metavar="NAME", help="Name for the audit log; by default your user.")
]
Devices = Annotated[list[str] | None, typer.Option("--device", help="Select this device; repeatable.")]

_SELECTION: Final[Mapping[str, tuple[object, object]]] = {
    "device": (Devices, None),
    "label": (
        Annotated[list[str] | None, typer.Option("--label", help="Select devices with this label; repeatable.")],
        None,
    ),
    "everything": (Annotated[bool, typer.Option("--all", help="Select all devices that are not retired.")], False),
    "of_model": (
        Annotated[str | None, typer.Option("--of-model", help="Of the selected, only devices with this draft model.")],
        None,
    ),
    "of_release": (
        Annotated[str | None, typer.Option("--of-release", help="Of the selected, only devices with this release.")],
        None,
    ),
}


def with_selection(command: Command) -> Command:
    """Give a command the devices that its options select, as `chosen`."""

    def choose(given: dict[str, Any]) -> AbstractContextManager[object]:
        from fleet_admin.steering import Selection

        selection = Selection(
            devices=tuple(dict.fromkeys(given["device"] or ())),
            labels=tuple(dict.fromkeys(given["label"] or ())),
            everything=given["everything"],
            draft_model=given["of_model"],
            software=given["of_release"],
        )
        return nullcontext(selection)

    return with_options("chosen", _SELECTION, choose)(command)


def operator() -> str:
    """Return the acting user, for the audit log."""
    user = getpass.getuser()
    through = os.environ.get("SUDO_USER")
    return f"{through} as {user}" if through else user


def actor_of(name: str | None) -> "Actor":
    from fleet_admin.steering import Actor

    user = operator()
    return Actor(f"{name} ({user})" if name else user, socket.gethostname())


def steering_log(db: str) -> "SteeringLog":
    with needs_extra("admin"):
        from fleet_admin.steering.log import SteeringLog

    return SteeringLog(db)


def open_steering(settings: "AdminSettings", db: str) -> "Steering":
    """Connect to broker and database; use it as a context manager."""
    with needs_extra("admin"):
        from fleet_admin.steering import Steering

    return Steering.open(settings, db)
