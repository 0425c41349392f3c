"""Registry of drafters: makes the one that the settings name."""

from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.drafters.model_source import locate_model
from fleet_device.drafters.prompt_lookup import Lookup, PromptLookupDrafter
from fleet_device.settings import DeviceSettings

__all__ = ["load_drafter"]


def load_drafter(settings: DeviceSettings) -> Drafter:
    """Load the draft model that the settings name.

    Raises:
        DrafterError: It cannot be found or loaded.
    """
    located = locate_model(settings.model, folder=settings.models)
    if settings.drafter == "prompt-lookup":
        return PromptLookupDrafter.from_gguf(located.path, Lookup(context=settings.context))
    return LlamaCppDrafter(
        LlamaCppSettings(
            path=located.path,
            name=located.name,
            threads=settings.threads,
            context=settings.context,
            gpu_layers=settings.gpu_layers,
        )
    )
