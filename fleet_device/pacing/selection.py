"""Chooses the pacing that a device's settings ask for."""

from fleet_device.drafters.registry import NO_DRAFTER
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import STREAMED, FixedPacing, Pacing
from fleet_device.settings import AUTO, DeviceSettings

__all__ = ["make_pacing"]


def make_pacing(settings: DeviceSettings) -> Pacing:
    """Return a new pacing: one that learns, unless the draft length is fixed or nothing is drafted."""
    ahead = None if settings.ahead == AUTO else settings.ahead
    if settings.stream is True or (settings.drafter == NO_DRAFTER and settings.stream == AUTO):
        return FixedPacing(STREAMED, stream=True)
    if settings.draft_length == AUTO:
        return AdaptivePacing(ahead=ahead, stream=None if settings.stream == AUTO else False)
    return FixedPacing(settings.draft_length, ahead or False)
