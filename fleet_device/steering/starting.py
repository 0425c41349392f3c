"""Start of a device with what was set from afar: if a model does not load with it, the device goes back and says so."""

import logging
from collections.abc import Callable

from fleet_device.drafters.contract import Drafter
from fleet_device.settings import DeviceSettings
from fleet_device.steering.remote_settings import RemoteSettings
from schemas.errors import FleetError

__all__ = ["apply_log_level", "load_steered"]


def load_steered(remote: RemoteSettings, load: Callable[[DeviceSettings], Drafter]) -> Drafter:
    """Load a draft model with the settings that are to hold, or else with those that held before.

    Args:
        remote: The settings; those with which it was loaded hold.
        load: Checks them, and loads.

    Raises:
        FleetError: It cannot be loaded with the device's own settings either.
    """
    failure: FleetError | None = None
    for settings in remote.candidates():
        try:
            drafter = load(settings)
        except FleetError as error:
            failure = failure or error
        else:
            remote.loaded(None if failure is None else str(failure))
            return drafter
    assert failure is not None  # there is at least one candidate
    raise failure


def apply_log_level(settings: DeviceSettings, usual: int) -> None:
    """Log from the severity on that the settings say.

    Args:
        settings: In which it may be left out.
        usual: Where it is.
    """
    level = settings.log_level
    logging.getLogger().setLevel(usual if level is None else level.upper())
