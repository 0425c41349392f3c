"""Rendering: templates with everything escaped, and figures, times and shares as people read them."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fleet_admin.dashboard.web.assets import asset_url
from fleet_runtime.terminal import printable

__all__ = ["ABSENT", "ago", "moment", "render", "shown"]

ABSENT: Final = "—"
_KIB: Final = 1024
_MINUTE_S: Final = 60
_HOUR_S: Final = 3_600
_DAY_S: Final = 86_400


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return a page; every value in it is escaped, and holds no control characters."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fleet_admin.dashboard", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_readable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "moment": moment}
    environment.globals["asset"] = asset_url
    return environment


def _readable(value: object) -> object:
    """Replace what would make a text read otherwise than it is: control characters, and marks of writing direction."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def shown(value: Any, kind: str = "text", *, now: datetime | None = None) -> str:  # noqa: ANN401 - of all kinds
    """Return a value as people read it.

    Args:
        value: What it is; None is shown as a dash.
        kind: `text`, `count`, `figure` (one digit), `percent`, `ms`, `bytes`, `moment`, `ago` or `days`.
        now: For `ago`.
    """
    if value is None or value == "":
        return ABSENT
    if kind == "ago":
        return ago(value, now=now)
    return _FORMS[kind](value)


def moment(value: datetime | None) -> str:
    """Return a time to the second, in UTC."""
    return ABSENT if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def ago(value: datetime | None, *, now: datetime | None) -> str:
    """Return how long ago a time is, in its largest unit."""
    if value is None:
        return ABSENT
    if now is None:
        return moment(value)
    age: timedelta = now - value
    seconds = max(age.total_seconds(), 0.0)
    for unit, length in (("d", _DAY_S), ("h", _HOUR_S), ("min", _MINUTE_S)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < _KIB or unit == "GiB":
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= _KIB
    raise AssertionError


_FORMS: Final[Mapping[str, Callable[[Any], str]]] = {
    "text": str,
    "count": lambda value: f"{value:,.0f}",
    "figure": lambda value: f"{value:,.2f}" if 0 < abs(value) < 1 else f"{value:,.1f}",
    "percent": lambda value: f"{100 * value:.1f} %",
    "ms": lambda value: f"{value:,.0f} ms" if value >= 10 else f"{value:,.1f} ms",  # noqa: PLR2004 - two digits do
    "bytes": _bytes,
    "days": lambda value: f"{value:,.0f} d",
    "moment": moment,
}
