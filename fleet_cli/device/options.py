"""Options that become the device's settings: each stated once, and taken by the commands that need it."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fleet_device.settings import DeviceSettings
from fleet_runtime.settings import load_settings

__all__ = ["with_settings"]

Command = Callable[..., None]

# What every command needs to know: who and where it is, how to reach the broker, what to draft with.
_COMMON: Final[Mapping[str, object]] = {
    "config": Annotated[Path | None, typer.Option(help="TOML file.", envvar="FLEET_DEVICE_CONFIG")],
    "fleet": Annotated[str | None, typer.Option(help="Fleet's name.")],
    "device": Annotated[str | None, typer.Option(help="This device's name.")],
    "host": Annotated[str | None, typer.Option(help="Broker's host.")],
    "port": Annotated[int | None, typer.Option(help="Broker's port.")],
    "ca": Annotated[Path | None, typer.Option(help="Who vouches for the broker (PEM); turns TLS on.")],
    "certificate": Annotated[Path | None, typer.Option(help="This device's own certificate (PEM).")],
    "key": Annotated[Path | None, typer.Option(help="Its private key (PEM).")],
    "model": Annotated[str | None, typer.Option(help="Draft model: prepared name, GGUF file, or repo:file.")],
    "models_dir": Annotated[Path | None, typer.Option(help="Folder of the prepared models.")],
    "drafter": Annotated[str | None, typer.Option(help="llama.cpp or prompt-lookup.")],
}
_MORE: Final[Mapping[str, object]] = {
    "mode": Annotated[str | None, typer.Option(help="residual or coupled.")],
    "temperature": Annotated[float | None, typer.Option(help="0 is greedy.")],
    "top_k": Annotated[int | None, typer.Option(help="0 keeps all.")],
    "top_p": Annotated[float | None, typer.Option(help="1 keeps all.")],
    "seed": Annotated[int | None, typer.Option(help="Same seed, same decisions.")],
    "max_new_tokens": Annotated[int | None, typer.Option(help="Most tokens to write.")],
    "draft_length": Annotated[str | None, typer.Option(help="Tokens in a draft, or auto.")],
    "ahead": Annotated[bool | None, typer.Option(help="Draft ahead of the verdict, or never do.")],
    "threads": Annotated[int | None, typer.Option(help="Threads of llama.cpp.")],
    "api_port": Annotated[int | None, typer.Option(help="Port of the local HTTP API; 0 turns it off.")],
}


def with_settings(*more: str) -> Callable[[Command], Command]:
    """Give a command the device's settings: on the command line, options stand where its `settings` parameter does.

    Args:
        more: Options that it takes beside the common ones.

    Raises:
        SettingsError: When the command is run: the file cannot be read, or a value cannot work.
    """
    options = {**_COMMON, **{name: _MORE[name] for name in more}}

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**given: Any) -> None:  # noqa: ANN401 - options of all types, by name
            flags = {name: given.pop(name) for name in options}
            command(settings=_read(flags), **given)

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


def _read(flags: dict[str, Any]) -> DeviceSettings:
    """Return the settings; a flag that is None was not given."""
    config, models = flags.pop("config"), flags.pop("models_dir")
    broker = {name: flags.pop(name) for name in ("host", "port", "ca", "certificate", "key")}
    return load_settings(DeviceSettings, config=config, flags={"broker": broker, "models": models, **flags})
