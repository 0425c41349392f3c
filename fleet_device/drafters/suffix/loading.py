"""Loads the suffix drafter as the device's settings say, and the history that it searches."""

from pathlib import Path
from typing import Final

from fleet_device.drafters.contract import Drafter, DrafterError
from fleet_device.drafters.gguf import GgufModel
from fleet_device.drafters.model_source import locate_model
from fleet_device.drafters.suffix.drafter import SuffixDrafter
from fleet_device.drafters.suffix.history import History
from fleet_device.drafters.suffix.history_file import HistoryFile
from fleet_device.settings import DeviceSettings
from fleet_runtime.state import state_folder
from schemas.vocabulary import Vocabulary

__all__ = ["history_folder", "load", "stand_before"]

_MEGA: Final = 1_000_000
_ON_DISK: Final = 4
"""Bytes of memory for each byte on disk, at least."""


def history_folder(settings: DeviceSettings) -> Path | None:
    """Return the folder of the history files; None for a user without a home, where the settings name none."""
    if settings.history_dir is not None:
        return settings.history_dir.expanduser()
    folder = state_folder()
    return None if folder is None else folder / settings.device


def load(settings: DeviceSettings) -> SuffixDrafter:
    """Load the vocabulary of the model file that the settings name, and the history.

    Raises:
        DrafterError: The file cannot be found or loaded.
    """
    model = GgufModel(locate_model(settings.model, folder=settings.models_dir).path, vocabulary_only=True)
    history = _history(settings, model.vocabulary)
    return SuffixDrafter(None, vocabulary=model.vocabulary, codec=model, context=settings.context, history=history)


def stand_before(model: Drafter, settings: DeviceSettings) -> Drafter:
    """Let a draft model have earlier text beside it, unless there is nothing to choose from.

    Raises:
        DrafterError: The history cannot be read for a reason that should not be possible; the model is closed.
    """
    if isinstance(model, SuffixDrafter) or model.name == "none":
        return model
    try:
        return SuffixDrafter.before(model, _history(settings, model.vocabulary))
    except DrafterError:
        model.close()
        raise


def _history(settings: DeviceSettings, vocabulary: Vocabulary) -> History | None:
    if not settings.history_mb:
        return None
    memory_bytes, folder = settings.history_mb * _MEGA, history_folder(settings)
    file = None if folder is None else HistoryFile(folder, vocabulary, most_bytes=memory_bytes // _ON_DISK)
    return History(memory_bytes=memory_bytes, file=file)
