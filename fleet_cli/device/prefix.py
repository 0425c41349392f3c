"""`fleet device prefix`: a system prompt as an edge's setting `shared_prefixes` has it."""

import json
from typing import Annotated

import typer

from fleet_cli.settings_flags import with_settings
from fleet_device.settings import DeviceSettings


@with_settings(DeviceSettings, only=("model", "models_dir"))
def prefix_command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The system prompt, as applications send it.")],
    settings: DeviceSettings,
) -> None:
    """Print a system prompt as the model reads it, for the edge's setting `shared_prefixes`."""
    from fleet_device.drafters.model_file import GgufModel, locate_model
    from fleet_device.requests.chat import chat_prefix

    model = GgufModel(locate_model(settings.model, folder=settings.models_dir).path, vocabulary_only=True)
    try:
        prefix = chat_prefix(model, prompt)
    finally:
        model.close()
    # A JSON string is a TOML string too.
    print(f"shared_prefixes = [{json.dumps(prefix, ensure_ascii=False)}]")
