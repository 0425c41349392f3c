"""Commands of `fleet admin` that steer devices: settings, commands, labels, quarantine; and the audit log."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from fleet_admin.report import Report
from fleet_admin.reports import as_assignments, setting_columns
from fleet_admin.settings import AdminSettings
from fleet_cli.admin.listing import Listing, with_listing
from fleet_cli.commands import CommandError, ExitCode
from fleet_cli.options import (
    DEFAULT_DB,
    Acting,
    AsJson,
    Database,
    Devices,
    actor_of,
    open_log,
    open_steering,
    profile_file,
    steering_log,
    with_selection,
    with_settings,
)
from fleet_cli.tables import Column, cell, print_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fleet_admin.steering import CommandResult, DeviceSettingsView, Selection, SettingsChange

R = TypeVar("R")

_with_profile: Final = with_settings(AdminSettings, file=profile_file)

_WAIT_S: Final = 10.0
_WELL: Final = frozenset({"in force", "needs restart", "waiting"})

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the devices and the changes; change nothing.")]
Wait = Annotated[float, typer.Option(min=0.1, max=600.0, help="Longest wait for the devices' answers (seconds).")]


@_with_profile
@with_selection
def set_command(
    assignments: Annotated[list[str], typer.Argument(metavar="KEY=VALUE…", help="Settings, as in device.toml.")],
    *,
    settings: AdminSettings,
    chosen: "Selection",
    dry_run: DryRun = False,
    wait: Wait = _WAIT_S,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
) -> None:
    """Change settings of devices: at once, or when they reconnect. A device gives a reason for what it refuses."""
    from fleet_admin.steering.planning import read_assignments

    changes = read_assignments(assignments)
    with open_steering(settings, db) as steering:
        planned = steering.preview(changes, chosen)
        if dry_run:
            _show_changes(planned, as_json=as_json)
            return
        results = _shown_as_they_come(
            steering.set(changes, chosen, actor=actor_of(acting), wait_s=wait), len(planned), as_json=as_json
        )
    _end_set(results, as_json=as_json)


@_with_profile
@with_selection
def unset_command(
    names: Annotated[list[str], typer.Argument(metavar="KEY…", help="Names of the settings.")],
    *,
    settings: AdminSettings,
    chosen: "Selection",
    dry_run: DryRun = False,
    wait: Wait = _WAIT_S,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
) -> None:
    """Remove settings that were set remotely, so that the devices' own apply."""
    with open_steering(settings, db) as steering:
        planned = steering.preview({}, chosen, unset=names)
        if dry_run:
            _show_changes(planned, as_json=as_json)
            return
        results = _shown_as_they_come(
            steering.set({}, chosen, actor=actor_of(acting), unset=names, wait_s=wait), len(planned), as_json=as_json
        )
    _end_set(results, as_json=as_json)


@_with_profile
@with_listing()
def settings_command(
    *, settings: AdminSettings, listing: Listing, device: Devices = None, db: Database = DEFAULT_DB
) -> None:
    """Compare requested settings with reported ones; for a device of --device, show all settings."""
    with open_steering(settings, db) as steering:
        found = steering.wanted_and_reported(device)
    if missing := sorted(set(device or ()) - {each.device for each in found}):
        raise CommandError(f"There is no device {missing[0]!r}; check the name.")
    columns: list[Column[DeviceSettingsView]] = [
        Column("device", "device", rank=0),
        Column("presence", lambda each: each.presence and each.presence.value, "state", rank=2),
        Column("state", "state.value", "state", rank=0),
        Column("remote settings", lambda each: as_assignments(each.wanted), key="settings", rank=1),
        Column("by", "wanted_by", rank=2),
        Column("since", "wanted_at", "moment", rank=2),
        Column("reported", "reported_at", "moment", rank=2),
        Column("message", "sentence", "sentence", rank=0),
    ]
    empty = "No device is known: neither the broker nor the session log has heard of one."
    listing.show(Report("devices", columns, lambda **_: found, "device", empty=empty))
    if device and not listing.as_json and not listing.as_csv:
        for each in found:
            names = sorted({*each.values, *each.wanted})
            print_table(f"Settings of {cell(each.device)}", setting_columns(each), names)


@_with_profile
@with_selection
def command_command(
    command: Annotated[str, typer.Argument(metavar="NAME", help="self-test, reload, drain, resume or log-tail.")],
    *,
    settings: AdminSettings,
    chosen: "Selection",
    timeout: Annotated[float | None, typer.Option(min=0.1, max=600.0, help="Time limit in seconds.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for long answers, one file per device.")] = None,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
) -> None:
    """Send devices a command and show their answers. Exit code 1 if one has failed."""
    with open_steering(settings, db) as steering:
        expected = len(steering.choose(chosen))
        given = steering.command(command, chosen, actor=actor_of(acting), timeout_s=timeout)
        results = _shown_as_they_come(given, expected, as_json=as_json)
    results.sort(key=lambda each: each.device)
    if out is not None:
        _write_results(out, command, results)
    show_results(results, as_json=as_json, texts=out is None)
    if not all(each.ok for each in results):
        raise typer.Exit(ExitCode.CHECK_FAILED)


def _shown_as_they_come(results: "Iterable[R]", expected: int, *, as_json: bool) -> "list[R]":
    """Collect results, and show their number on a terminal."""
    shows = not as_json and sys.stderr.isatty()
    found: list[R] = []
    for result in results:
        found.append(result)
        if shows:
            print(f"\r{len(found)} of {expected} have answered", end="", file=sys.stderr, flush=True)
    if shows:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return found


def _end_set(results: "list[DeviceSettingsView]", *, as_json: bool) -> None:
    results.sort(key=lambda each: each.device)
    columns: list[Column[DeviceSettingsView]] = [
        Column("device", "device", rank=0),
        Column("state", "state.value", "state", rank=0),
        Column("", "sentence", "sentence", rank=0),
    ]
    print_table(_title(each.state.value for each in results), columns, results, as_json=as_json)
    if not all(each.state.value in _WELL for each in results):
        raise typer.Exit(ExitCode.CHECK_FAILED)


def _show_changes(planned: "Sequence[SettingsChange]", *, as_json: bool) -> None:
    columns: list[Column[SettingsChange]] = [
        Column("device", "device", rank=0),
        Column("presence", lambda each: each.presence and each.presence.value, "state"),
        Column("wanted now", lambda each: as_assignments(each.before), rank=0),
        Column("would be wanted", lambda each: as_assignments(each.after), rank=0),
        Column("no longer requested: refused", lambda each: ", ".join(each.dropped) or None, rank=0),
        Column("needs a reload", lambda each: ", ".join(each.needs_restart) or None, rank=0),
    ]
    title = f"Devices that it concerns: {len(planned)}. Nothing was changed."
    print_table(title, columns, planned, as_json=as_json)


def _title(outcomes: "Iterable[str]") -> str:
    counted = Counter(outcomes)
    return f"Devices: {counted.total()}; " + ", ".join(f"{number} {word}" for word, number in counted.items())


def show_results(results: "Sequence[CommandResult]", *, as_json: bool, texts: bool) -> None:
    columns: list[Column[CommandResult]] = [
        Column("device", "device", rank=0),
        Column("outcome", "outcome", "state", rank=0),
        Column("after", lambda each: None if each.seconds is None else 1e3 * each.seconds, "ms"),
        Column("", "sentence", "sentence", rank=0),
    ]
    print_table(_title(each.outcome for each in results), columns, results, as_json=as_json)
    for each in results if texts and not as_json else ():
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
        raise CommandError(f"The devices' answers cannot be written to {folder}: {error.strerror}.") from error


def label(
    devices: Annotated[list[str], typer.Argument(metavar="DEVICE…")],
    add: Annotated[list[str] | None, typer.Option("--add", help="Label to add; repeatable.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="Label to remove; repeatable.")] = None,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
) -> None:
    """Add or remove labels: `fleet admin label gateway-7 gateway-8 --add hall_a`."""
    with steering_log(db) as log:
        found = log.label(devices, add=add or (), remove=remove or (), actor=actor_of(acting))
        unseen = sorted(set(devices) - {name for name, each in log.known().items() if each.presence is not None})
    for name in unseen:
        typer.echo(f"fleet: No device {name} has been seen yet; it is labelled nevertheless.", err=True)
    for device, words in found.items():
        typer.echo(f"{device}: {' '.join(words) or 'no label'}")


@_with_profile
def retire_command(
    device: Annotated[str, typer.Argument(metavar="DEVICE")],
    *,
    settings: AdminSettings,
    undo: Annotated[bool, typer.Option("--undo", help="Return the device to service.")] = False,
    log_only: Annotated[
        bool, typer.Option("--log-only", help="Keep the device's remote settings at the broker.")
    ] = False,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
) -> None:
    """Retire a device: from now on it is selected only by its name. Its records stay."""
    actor = actor_of(acting)
    if log_only or undo:
        with steering_log(db) as log:
            log.retire(device, undo=undo, actor=actor)
    else:
        with open_steering(settings, db) as steering:
            steering.retire(device, actor=actor)
    if undo:
        typer.echo(f"{cell(device)} is in service again.")
    else:
        typer.echo(f"{cell(device)} is retired. Its certificate is still valid: revoke it with `fleet broker revoke`.")


def quarantine(
    name: Annotated[str, typer.Argument(metavar="DEVICE")],
    duration: Annotated[
        str | None, typer.Option("--for", help="Duration: 90s, 30m, 2h, 7d; by default until lifted.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Reason, shown to other administrators.")] = "",
    acting: Acting = None,
    db: Database = DEFAULT_DB,
) -> None:
    """Quarantine a device: within seconds the edges drop its messages."""
    actor = actor_of(acting)
    with open_log(db) as log:
        from fleet_edge.session_log import NotFound

        held = log.quarantine(name, duration=duration, reason=reason, who=actor.who, source=actor.source)
        try:
            log.device(name)
        except NotFound:
            typer.echo(f"fleet: No device {name} has been seen yet; it is quarantined nevertheless.", err=True)
    until = "until it is lifted" if held.until_at is None else f"until {cell(held.until_at)} UTC"
    typer.echo(f"{name} is quarantined {until}; fleet admin unquarantine {name} ends that.")


def unquarantine(
    name: Annotated[str, typer.Argument(metavar="DEVICE")], acting: Acting = None, db: Database = DEFAULT_DB
) -> None:
    """End the quarantine of a device."""
    actor = actor_of(acting)
    with open_log(db) as log:
        held = log.unquarantine(name, who=actor.who, source=actor.source)
    if held is None:
        typer.echo(f"{name} was not quarantined according to the log; any quarantine until now is lifted.")
    else:
        typer.echo(f"The quarantine of {name} by {cell(held.by)} is lifted: {cell(held.reason)}")


def register(app: typer.Typer) -> None:
    for command in (label, quarantine, unquarantine):
        app.command()(command)
    app.command("set")(set_command)
    app.command("unset")(unset_command)
    app.command("settings")(settings_command)
    app.command("command")(command_command)
    app.command("retire")(retire_command)
