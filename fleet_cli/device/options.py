"""Options that the device's commands have in common, and the settings that come of them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fleet_device.settings import DeviceSettings
from fleet_link.configuration import load_settings

__all__ = [
    "Ahead",
    "ApiPort",
    "Authority",
    "Certificate",
    "Config",
    "Device",
    "DraftLength",
    "DrafterKind",
    "Fleet",
    "Host",
    "Key",
    "Model",
    "ModelsDir",
    "Port",
    "Threads",
    "read_settings",
]

Config = Annotated[Path | None, typer.Option(help="TOML file.", envvar="FLEET_DEVICE_CONFIG")]
Fleet = Annotated[str | None, typer.Option(help="Fleet's name.")]
Device = Annotated[str | None, typer.Option(help="This device's name.")]
Host = Annotated[str | None, typer.Option(help="Broker's host.")]
Port = Annotated[int | None, typer.Option(help="Broker's port.")]
Authority = Annotated[Path | None, typer.Option("--ca", help="Who vouches for the broker (PEM); turns TLS on.")]
Certificate = Annotated[Path | None, typer.Option(help="This device's own certificate (PEM).")]
Key = Annotated[Path | None, typer.Option(help="Its private key (PEM).")]
Model = Annotated[str | None, typer.Option(help="Draft model: prepared name, GGUF file, or repo:file.")]
ModelsDir = Annotated[Path | None, typer.Option(help="Folder of the prepared models.")]
DrafterKind = Annotated[str | None, typer.Option(help="llama.cpp or prompt-lookup.")]
DraftLength = Annotated[int | None, typer.Option(help="Tokens in a draft.")]
Ahead = Annotated[bool | None, typer.Option(help="Draft ahead of the verdict.")]
Threads = Annotated[int | None, typer.Option(help="Threads of llama.cpp.")]
ApiPort = Annotated[int | None, typer.Option(help="Port of the local HTTP API; 0 turns it off.")]


def read_settings(
    config: Path | None,
    *,
    host: str | None,
    port: int | None,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    models_dir: Path | None,
    **flags: Any,  # noqa: ANN401 - settings of all types, by name
) -> DeviceSettings:
    """Return the settings; a flag that is None was not given.

    Raises:
        SettingsError: The file cannot be read, or a value cannot work.
    """
    broker = {"host": host, "port": port, "ca": ca, "certificate": certificate, "key": key}
    named = {"broker": broker, "models": models_dir, **flags}
    return load_settings(DeviceSettings, config=config, flags=named)
