"""Registry of drafters: names for the settings, and what loads each.

A new drafter is a module with a `load` function, and a line here. Nothing is imported before it is asked for: the
settings take the names from here, and a machine needs no library but those of the drafter that it uses.
"""

from collections.abc import Mapping
from pkgutil import resolve_name
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fleet_device.drafters.contract import Drafter
    from fleet_device.settings import DeviceSettings

__all__ = ["DRAFTERS", "MODEL_DRAFTER", "NO_DRAFTER", "load_drafter"]

MODEL_DRAFTER: Final = "llama.cpp"
"""The one with a model of its own, which can also write a text alone."""

NO_DRAFTER: Final = "none"

DRAFTERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        MODEL_DRAFTER: "fleet_device.drafters.llama_cpp:load",
        "suffix": "fleet_device.drafters.suffix.drafter:load",
        "prompt-lookup": "fleet_device.drafters.prompt_lookup:load",
        NO_DRAFTER: "fleet_device.drafters.none:load",
    }
)
"""By name, the function that takes the device's settings and returns the drafter. The first is the default."""


def load_drafter(settings: "DeviceSettings") -> "Drafter":
    """Load the drafter that the settings name, and fit it to the target's vocabulary if they name that too.

    Raises:
        DrafterError: It cannot be found or loaded, or does not fit.
    """
    drafter: Drafter = resolve_name(DRAFTERS[settings.drafter])(settings)
    if settings.target_vocabulary is not None:
        drafter = resolve_name("fleet_device.drafters.unlike:wrap")(drafter, settings)
    if settings.suffix:
        drafter = resolve_name("fleet_device.drafters.suffix.drafter:stand_before")(drafter, settings)
    return drafter
