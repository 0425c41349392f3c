"""Rendering: templates with everything escaped."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fleet_admin.columns import moment, shown
from fleet_admin.dashboard.web.assets import asset_url
from schemas.printable import printable


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
