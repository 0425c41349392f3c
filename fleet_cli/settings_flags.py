"""Flags made of the settings of a program: a command asks for the settings, and its command line has their flags."""

import inspect
from collections.abc import Callable, Collection
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fleet_common.settings import SettingField, Settings, fields_of, load_settings

Command = Callable[..., None]

_COMMON: Final = "Settings"
_RARE: Final = "Settings that are rarely needed"


def with_settings(model: type[Settings], *, only: Collection[str] = ()) -> Callable[[Command], Command]:
    """Give a command settings: on the command line, flags stand where its `settings` parameter does.

    Args:
        model: Whose settings.
        only: Names of the settings that have a flag here; all that have one anywhere, if left out.

    Raises:
        SettingsError: When the command is run: the file cannot be read, or values cannot work.
    """
    known = {each.name: each for each in fields_of(model) if each.flag is not None}
    fields = {_parameter(each): each for each in (map(known.__getitem__, only) if only else known.values())}
    variable = model.variable_prefix + "CONFIG"
    options: dict[str, object] = {
        "config": Annotated[
            Path | None, typer.Option(metavar="PATH", help="TOML file with settings.", envvar=variable)
        ],
        **{name: _option(each) for name, each in fields.items()},
    }

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**given: Any) -> None:  # noqa: ANN401 - options of all types, by name
            config = given.pop("config")
            flags = {each.path: given.pop(name) for name, each in fields.items()}
            command(settings=load_settings(model, config=config, flags=_nested(flags)), **given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == "settings":
                parameters += (
                    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
                    for name, option in options.items()
                )
            else:
                parameters.append(parameter)
        # typer looks at both.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _parameter(field: SettingField) -> str:
    return "_".join(field.path)


def _option(field: SettingField) -> object:
    """Return the option of a setting. It takes any text: the settings judge it, all of them at once."""
    flag = f"{field.flag}/--no-{str(field.flag).removeprefix('--')}" if field.switch else field.flag
    facts = [] if field.metavar != "WORD" or field.switch else [field.kind]
    facts += [f"default {field.default} {field.unit}".strip()] if field.default else []
    info = typer.Option(
        flag,
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
