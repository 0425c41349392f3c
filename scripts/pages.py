#!/usr/bin/env python3
"""Writes docs/settings.md and docs/events.md from the code; --check only compares."""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fleet_admin.dashboard.settings import DashboardSettings
from fleet_admin.settings import AdminSettings
from fleet_common.settings import SettingField, Settings, fields_of
from fleet_device.settings import DeviceSettings
from fleet_edge.session_log.alerts.settings import AlertSettings
from fleet_edge.session_log.event_codes import EVENT_CODES, EventKind, Severity
from fleet_edge.settings import EdgeSettings

DOCS = Path(__file__).resolve().parent.parent / "docs"
SETTINGS_HEAD = """# Settings

<!-- Written by scripts/pages.py from the settings classes of device, edge, administrator, dashboard and alerts. -->

A setting is read from, in this order: a flag, an environment variable, the TOML file, the default. `--help` of a command has values, defaults and meanings of
its settings; this page has their names, and those without a flag.

| source | name of the setting `NAME` |
| --- | --- |
| flag | `--NAME` with dashes for underscores. Of a name with a dot, only the last part counts: `--host` for `broker.host`. Booleans take no value: `--ahead`, `--no-ahead` |
| environment | the prefix of the table and the name in capitals, with `__` for a dot: `FLEET_DEVICE_BROKER__HOST` |
| TOML file | `NAME`; with a dot, in a section: `host` below `[broker]`. The file is named by `--config` or the prefix and `CONFIG`: `FLEET_EDGE_CONFIG` |

Secrets have no flag, because every user of a machine can see the flags of its processes. Put them, and a URL `db` with a password, in a file that only the
program may read, or in a variable.
"""  # noqa: E501 - tables and paragraphs of a page
EVENTS_HEAD = """# Events

<!-- Written by scripts/pages.py from fleet_edge/session_log/event_codes.py. -->

The session log records events: of a device, an edge, the broker, the database, or an administrator. An event has time, kind, code, severity and a sentence;
where they apply, also device, session and user. `edge` is the edge that logged it, or `the administrator` for actions of `fleet admin`.

    fleet admin events --since 2h                       # latest first
    fleet admin events severity!=info --follow          # live, until Ctrl-C
    fleet admin events kind=refused device=gateway-7
    fleet admin events --count kind,code --since 7d     # counts

Repetitions of an event of one device within a minute are counted in one row: a device that floods adds at most 16 rows a minute. What all edges see (a
device connects) is one event. Events are kept as long as sessions (`keep_sessions_days`). [The protocol](protocol.md#refused-down) has the codes of `refused` and
`fault`.
"""  # noqa: E501
SEVERITIES = {
    Severity.ERROR: "Errors: something failed or was lost",
    Severity.WARNING: "Warnings: degraded, but working",
    Severity.INFO: "Information: as expected",
}
MODELS: dict[str, tuple[type[Settings], str]] = {
    "Device": (DeviceSettings, "fleet device run"),
    "Edge": (EdgeSettings, "fleet edge run"),
    "Administrator": (AdminSettings, "fleet admin set"),
    "Dashboard": (DashboardSettings, "fleet admin serve"),
    "Alerts, in a file of their own": (AlertSettings, ""),
}
"""Settings of a program, and the command that has them as flags."""

COLUMNS = ("setting", "value (default)", "meaning")
_NUMBERS = (
    (r" from (\d+) to (10{9}(\.0)?|1099511627776)$", r" ≥ \1"),  # as good as unbounded
    (r" and up to 10{9}(\.0)?$", ""),
    (r"\bwhole number\b", "integer"),
    (r" from (-?[\d.]+) to ([\d.]+)", r" \1–\2"),  # noqa: RUF001
    (r" of at least ([\d.]+)", r" ≥ \1"),
    (r" above ([\d.]+) and up to ([\d.]+)", r" > \1, ≤ \2"),
    (r" above ([\d.]+)", r" > \1"),
    (r"(\d)\.0\b", r"\1"),
    ("^name of .*", "name"),
    ("^true or false$", "boolean"),
    ("text that is not empty", "text"),
)


def value(field: SettingField) -> str:
    """Return a setting's values, unit and default."""
    kind = field.kind.removeprefix("a ")
    for pattern, short in _NUMBERS:
        kind = re.sub(pattern, short, kind)
    words = ", ".join(filter(None, (kind, field.unit)))
    return f"{words} (`{field.default}`)" if field.default else words


def row(field: SettingField) -> str:
    note = "" if field.flag else " No flag." if field.shown else " A secret: no flag."
    return f"| `{field.name}` | {value(field)} | {field.meaning}{note} |"


def names(fields: Iterable[SettingField]) -> str:
    return ", ".join(f"`{field.name}`" for field in fields)


def section(title: str, prefix: str, command: str, fields: Sequence[SettingField]) -> str:
    """Return the names of the settings that a command's help explains, and a table of the others."""
    explained = [field for field in fields if command and field.flag]
    others = [field for field in fields if field not in explained]
    parts = [f"\n## {title}\n", f"Environment: {prefix}\n"]
    if explained:
        parts.append(f"`{command} --help` explains {names(explained)}.\n")
    if others:
        parts += [f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", *map(row, others), ""]
    return "\n".join(parts)


def settings_page() -> str:
    sections = [
        (title, f"`{model.variable_prefix}…`", command, [each for each in fields_of(model) if each.path[0] != "broker"])
        for title, (model, command) in MODELS.items()
    ]
    broker = [field for field in fields_of(AdminSettings) if field.path[0] == "broker"]
    variables = "`FLEET_{DEVICE,EDGE,ADMIN,DASHBOARD,ALERTS}_…`"
    sections.insert(3, ("Broker, for all of them", variables, "fleet device run", broker))
    return SETTINGS_HEAD + "".join(section(*each) for each in sections)


def events_page() -> str:
    """Return the page of events; what is expected is a list of codes, and the protocol explains refusals and faults."""
    parts = [EVENTS_HEAD]
    for severity, title in SEVERITIES.items():
        rows = []
        for kind in (kind for kind in EventKind if kind not in {EventKind.REFUSED, EventKind.FAULT}):
            found = [each for each in EVENT_CODES if each.kind is kind and each.severity is severity]
            if severity is not Severity.INFO:
                rows += [f"- `{kind}/{each.code}`: {each.meaning}" for each in found]
            elif found:
                rows.append(f"- `{kind}`: {', '.join(f'`{each.code}`' for each in found)}")
        parts.append("\n".join([f"\n## {title}\n", *rows, ""]))
    return "".join(parts)


def main() -> int:
    pages = {DOCS / "settings.md": settings_page(), DOCS / "events.md": events_page()}
    if sys.argv[1:] == ["--check"]:
        stale = [path.name for path, wanted in pages.items() if path.read_text(encoding="utf-8") != wanted]
        if stale:
            print(f"docs/{stale[0]} is not current: run .venv/bin/python scripts/pages.py", file=sys.stderr)
        return int(bool(stale))
    for path, wanted in pages.items():
        path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
