"""`fleet admin set|unset|settings|command|commands`: settings and commands for devices, from afar."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from fleet_admin.settings import AdminSettings
from fleet_cli.admin.actor import (
    Acting,
    AllDevices,
    Devices,
    EdgeOf,
    Labels,
    ModelOf,
    Release,
    Silent,
    actor_of,
    monitor,
    selection_of,
    steering_log,
)
from fleet_cli.admin.options import DEFAULT_DB, AsJson, Database, Since, Wide
from fleet_cli.errors import CommandError, ExitCode
from fleet_cli.settings_flags import with_settings
from fleet_cli.tables import Column, cell, plain, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fleet_admin.steering import CommandResult, DeviceSettingsView, SetResult, SettingsChange
    from fleet_edge.store.steering.views import CommandView

R = TypeVar("R")

_WAIT_S: Final = 10.0
_WELL: Final = frozenset({"in force", "needs restart", "waiting"})

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say whom it concerns and what would change; do nothing.")]
Wait = Annotated[float, typer.Option(min=0.1, max=600.0, help="Longest wait for the devices' answers (seconds).")]


def register(app: typer.Typer) -> None:
    app.command("set")(set_command)
    app.command("unset")(unset_command)
    app.command("settings")(settings_command)
    app.command("command")(command_command)
    app.command("commands")(commands_command)


@with_settings(AdminSettings)
def set_command(
    assignments: Annotated[list[str], typer.Argument(metavar="KEY=VALUE…", help="Settings, as in device.toml.")],
    *,
    settings: AdminSettings,
    device: Devices = None,
    label: Labels = None,
    everything: AllDevices = False,
    of_edge: EdgeOf = None,
    of_model: ModelOf = None,
    of_release: Release = None,
    silent: Silent = None,
    dry_run: DryRun = False,
    wait: Wait = _WAIT_S,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Have devices use other settings: at once, or when they are back; what they refuse, they refuse with a reason."""
    from fleet_admin.steering.values import read_assignments

    changes = read_assignments(assignments)
    chosen = selection_of(
        device, label, everything=everything, edge=of_edge, model=of_model, release=of_release, silent=silent
    )
    with monitor(settings, db) as steering:
        planned = steering.preview(changes, chosen)
        if dry_run:
            _show_changes(planned, as_json=as_json, wide=wide)
            return
        results = _shown_as_they_come(
            steering.set(changes, chosen, actor=actor_of(acting), wait_s=wait), len(planned), as_json=as_json
        )
    _end_set(results, as_json=as_json, wide=wide)


@with_settings(AdminSettings)
def unset_command(
    names: Annotated[list[str], typer.Argument(metavar="KEY…", help="Settings that were set from afar.")],
    *,
    settings: AdminSettings,
    device: Devices = None,
    label: Labels = None,
    everything: AllDevices = False,
    of_edge: EdgeOf = None,
    of_model: ModelOf = None,
    of_release: Release = None,
    silent: Silent = None,
    dry_run: DryRun = False,
    wait: Wait = _WAIT_S,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Take settings back: the devices' own hold again."""
    chosen = selection_of(
        device, label, everything=everything, edge=of_edge, model=of_model, release=of_release, silent=silent
    )
    with monitor(settings, db) as steering:
        planned = steering.preview({}, chosen, unset=names)
        if dry_run:
            _show_changes(planned, as_json=as_json, wide=wide)
            return
        results = _shown_as_they_come(
            steering.unset(names, chosen, actor=actor_of(acting), wait_s=wait), len(planned), as_json=as_json
        )
    _end_set(results, as_json=as_json, wide=wide)


@with_settings(AdminSettings)
def settings_command(
    *,
    settings: AdminSettings,
    device: Devices = None,
    log_only: Annotated[
        bool, typer.Option("--log-only", help="Ask the database alone, as an administrator has last heard.")
    ] = False,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Compare the settings that are wanted of devices with those that they have; of one device, all of them."""
    if log_only:
        from fleet_admin.steering.planning import views_of_log

        with steering_log(db) as log:
            found = views_of_log(log.known(), log.wanted(), log.reported(), devices=device)
    else:
        with monitor(settings, db) as steering:
            found = steering.wanted_and_reported(device)
    if missing := sorted(set(device or ()) - {each.device for each in found}):
        raise CommandError(f"Nothing is known of a device {missing[0]!r}; check the name.")
    if as_json:
        print_json(found)
    else:
        _show_settings(found, wide=wide, whole=bool(device))


@with_settings(AdminSettings)
def command_command(
    command: Annotated[
        str,
        typer.Argument(metavar="NAME", help="self-test, reload, drain, pause, resume, log-tail or support-bundle."),
    ],
    *,
    settings: AdminSettings,
    device: Devices = None,
    label: Labels = None,
    everything: AllDevices = False,
    of_edge: EdgeOf = None,
    of_model: ModelOf = None,
    of_release: Release = None,
    silent: Silent = None,
    argument: Annotated[
        list[str] | None, typer.Option("--argument", metavar="KEY=VALUE", help="For the command: lines=200.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=0.1, max=600.0, help="Seconds that it is given.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for what the devices answer at length, a file for each.")
    ] = None,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Give devices a command, and show what they answer. Exit code 1 if one has not done it."""
    from fleet_admin.steering.values import read_assignments

    chosen = selection_of(
        device, label, everything=everything, edge=of_edge, model=of_model, release=of_release, silent=silent
    )
    arguments = read_assignments(argument or ())
    with monitor(settings, db) as steering:
        expected = len(steering.choose(chosen))
        given = steering.command(command, chosen, actor=actor_of(acting), arguments=arguments, timeout_s=timeout)
        results = _shown_as_they_come(given, expected, as_json=as_json)
    results.sort(key=lambda each: each.device)
    if out is not None:
        _write_results(out, command, results)
    if as_json:
        print_json(results)
    else:
        _show_results(results, wide=wide, texts=out is None)
    if not all(each.ok for each in results):
        raise typer.Exit(ExitCode.CHECK_FAILED)


def commands_command(
    device: Devices = None,
    since: Since = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the latest first.")] = 50,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List the commands that were given, and what came of them."""
    with steering_log(db) as log:
        found = log.commands(since=since, devices=device or (), limit=limit)
    if as_json:
        print_json(found)
    else:
        _show_commands(found, wide=wide)


def _shown_as_they_come(results: "Iterable[R]", expected: int, *, as_json: bool) -> "list[R]":
    """Take results, and say on a terminal how many have come."""
    shows = not as_json and sys.stderr.isatty()
    found: list[R] = []
    for result in results:
        found.append(result)
        if shows:
            print(f"\r{len(found)} of {expected} have answered", end="", file=sys.stderr, flush=True)
    if shows:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return found


def _end_set(results: "list[SetResult]", *, as_json: bool, wide: bool) -> None:
    results.sort(key=lambda each: each.device)
    if as_json:
        print_json(results)
    else:
        counted = Counter(each.state.value for each in results)
        title = f"Devices: {len(results)}; " + ", ".join(f"{number} {state}" for state, number in counted.items())
        columns: list[Column[SetResult]] = [
            Column("device", lambda each: each.device, rank=0),
            Column("version", lambda each: each.version, "count"),
            Column("state", lambda each: each.state.value, "state", rank=0),
            Column("", lambda each: each.sentence, "sentence", rank=0),
        ]
        print_table(title, columns, results, wide=wide)
    if not all(each.state.value in _WELL for each in results):
        raise typer.Exit(ExitCode.CHECK_FAILED)


def _show_changes(planned: "Sequence[SettingsChange]", *, as_json: bool, wide: bool) -> None:
    if as_json:
        print_json(planned)
        return
    columns: list[Column[SettingsChange]] = [
        Column("device", lambda each: each.device, rank=0),
        Column("presence", lambda each: each.presence and each.presence.value, "state"),
        Column("wanted now", lambda each: _assignments(each.before), rank=0),
        Column("would be wanted", lambda each: _assignments(each.after), rank=0),
        Column("wanted no more, as refused", lambda each: ", ".join(each.dropped) or None, rank=0),
        Column("needs a reload", lambda each: ", ".join(each.needs_restart) or None, rank=0),
    ]
    print_table(f"Devices that it concerns: {len(planned)}. Nothing was changed.", columns, planned, wide=wide)


def _show_settings(found: "Sequence[DeviceSettingsView]", *, wide: bool, whole: bool) -> None:
    columns: list[Column[DeviceSettingsView]] = [
        Column("device", lambda each: each.device, rank=0),
        Column("presence", lambda each: each.presence and each.presence.value, "state", rank=2),
        Column("wanted", lambda each: each.wanted_version, "count", rank=1),
        Column("reported", lambda each: each.reported_version, "count", rank=2),
        Column("in force", lambda each: each.applied, "count", rank=1),
        Column("state", lambda each: each.state.value, "state", rank=0),
        Column("settings from afar", lambda each: _assignments(each.wanted), rank=1),
        Column("by", lambda each: each.wanted_by or None, rank=2),
        Column("since", lambda each: each.wanted_at, "moment", rank=2),
        Column("", lambda each: each.sentence, "sentence", rank=0),
    ]
    empty = "No device is known: neither the broker nor the session log has heard of one."
    print_table(f"Devices: {len(found)}", columns, found, wide=wide, empty=empty)
    for each in found if whole else ():
        names = sorted({*each.values, *each.wanted})
        rows: list[Column[str]] = [
            Column("setting", lambda name: name, rank=0),
            Column("wanted", lambda name, each=each: each.wanted.get(name), rank=0),  # type: ignore[misc]
            Column("in force", lambda name, each=each: each.values.get(name), rank=0),  # type: ignore[misc]
            Column("", lambda name, each=each: _remark(each, name), "sentence", rank=0),  # type: ignore[misc]
        ]
        print_table(f"Settings of {cell(each.device)}", rows, names, wide=wide)


def _remark(view: "DeviceSettingsView", name: str) -> str | None:
    if name in view.refused:
        return f"refused: {view.refused[name]}"
    if name in view.needs_restart:
        return "in force after a reload"
    return "fixed by the device" if name in view.fixed else None


def _show_results(results: "Sequence[CommandResult]", *, wide: bool, texts: bool) -> None:
    counted = Counter(each.outcome for each in results)
    title = f"Devices: {len(results)}; " + ", ".join(f"{number} {outcome}" for outcome, number in counted.items())
    columns: list[Column[CommandResult]] = [
        Column("device", lambda each: each.device, rank=0),
        Column("outcome", lambda each: each.outcome, "state", rank=0),
        Column("after", lambda each: None if each.seconds is None else 1e3 * each.seconds, "ms"),
        Column("", lambda each: each.sentence, "sentence", rank=0),
    ]
    print_table(title, columns, results, wide=wide)
    for each in results if texts else ():
        if each.result is not None:
            print(f"{cell(each.device)}:")
            for line in each.result.splitlines():
                print(f"    {cell(line)}")


def _write_results(folder: Path, name: str, results: "Sequence[CommandResult]") -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for each in results:
            if each.result is not None:
                (folder / f"{each.device}.{name}.txt").write_text(each.result + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"What the devices answered cannot be written to {folder}: {error.strerror}.") from error


def _show_commands(found: "Sequence[CommandView]", *, wide: bool) -> None:
    columns: list[Column[CommandView]] = [
        Column("at", lambda each: each.at, "moment", rank=0),
        Column("who", lambda each: each.who, rank=2),
        Column("command", lambda each: " ".join(filter(None, (each.command, _assignments(each.arguments)))), rank=0),
        Column("device", lambda each: each.device, rank=0),
        Column("outcome", lambda each: each.outcome, "state", rank=0),
        Column("", lambda each: each.sentence, "sentence", rank=1),
        Column("id", lambda each: each.id, "id", rank=3),
    ]
    print_table(f"Commands: {len(found)}", columns, found, wide=wide, empty="No command was given.")


def _assignments(values: "Mapping[str, object]") -> str | None:
    return ", ".join(f"{name}={_value(value)}" for name, value in values.items()) or None


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(plain(value))
