"""Load the drafter that the settings name.

A new drafter is a module with a `load` function, and a line in `DRAFTERS` of the settings. A drafter's module is only
imported when it is loaded, so a machine needs no library but those of the drafter that it uses.
"""

from pkgutil import resolve_name

from fleet_device.drafters.contract import Drafter
from fleet_device.settings import DRAFTERS, DeviceSettings


def load_drafter(settings: DeviceSettings) -> Drafter:
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
