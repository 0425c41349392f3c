"""Checks of the demo's options, before anything is started: what is wrong with one is said of that one."""

import os
from collections.abc import Mapping
from pathlib import Path

from fleet_cli.commands import program
from fleet_cli.errors import CommandError
from fleet_cli.models.source import SMOLLM2
from fleet_common.settings import load_settings
from fleet_device.drafters.model_file import locate_model
from fleet_device.settings import DeviceSettings
from fleet_edge.settings import EdgeSettings


def draft_model(draft: str, models: Path) -> str:
    """Return what the devices' setting `model` is to be; the model is there, unless a repository has it.

    Args:
        draft: A quantization of the demo's own model, or whatever else the setting may hold.
        models: Folder of the prepared models.

    Raises:
        CommandError: There is no such draft.
        ModelNotFound: There is no such prepared model.
    """
    repository = os.sep in draft and ":" in draft and not Path(draft).exists()
    if not repository and (os.sep in draft or draft.endswith(".gguf")):
        if not Path(draft).expanduser().is_file():
            raise CommandError(
                f"--draft {draft} is no file; name a GGUF, or a quantization such as {SMOLLM2.drafts[0]}."
            )
        return draft
    if ":" in draft:
        locate_model(draft, folder=models)  # a repository's is fetched here, once for all devices
        return draft
    known = {name.lower(): name for name in (*SMOLLM2.drafts, SMOLLM2.shipped, *_prepared(models))}
    if draft.lower() not in known:
        raise CommandError(
            f"--draft {draft} is no quantization of {SMOLLM2.name}; there are {', '.join(sorted(known.values()))}, or "
            "name a GGUF file."
        )
    model = f"{SMOLLM2.name}:{known[draft.lower()]}"
    locate_model(model, folder=models)
    return model


def target_model(target: str | None, models: Path, *, engine: str) -> str:
    """Return what the edge's setting `target` is to be: what is given, which the edge checks, or the demo's own.

    Args:
        target: As given.
        models: Folder of the prepared models.
        engine: That it is for.

    Raises:
        CommandError: The demo's own is not there.
    """
    if target is not None:
        return target
    path = models / SMOLLM2.name / ("target-Q8_0.gguf" if engine == "llama.cpp" else "target")
    if not path.exists():
        elsewhere = "" if models == Path("models") else f" --models-dir {models}"
        raise CommandError(
            f"The demo's models are not in {models.absolute()}; make them with `{program()} models prepare "
            f"--only {SMOLLM2.drafts[0]} --only {path.stem}{elsewhere}`, or name their folder with --models-dir."
        )
    return str(path)


def check_report_file(path: Path | None) -> None:
    """Check that a report can be written when the demo is over.

    Raises:
        CommandError: It cannot.
    """
    if path is None or str(path) == "-":
        return
    folder = path.parent
    if path.is_dir():
        raise CommandError(f"--json {path} is a folder; name a file.")
    if not folder.is_dir():
        raise CommandError(f"--json {path} cannot be written, since there is no folder {folder}; make it first.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise CommandError(f"--json {path} cannot be written; name a file where you may write.")


def check_settings(*, device: Mapping[str, object], edge: Mapping[str, object]) -> None:
    """Check what the demo's options become of either end's settings.

    Raises:
        SettingsError: A value cannot work.
        StoreUnavailable: The database's URL cannot be read.
    """
    from fleet_edge.store.engine import parse_url

    load_settings(DeviceSettings, config=None, flags=device)
    parse_url(load_settings(EdgeSettings, config=None, flags=edge).db)


def _prepared(models: Path) -> list[str]:
    return [path.stem for path in (models / SMOLLM2.name).glob("*.gguf")]
