"""Steering: settings and commands for devices from afar, labels, and the audit log of what administrators do."""

from fleet_admin.steering.errors import SteeringError
from fleet_admin.steering.log import SteeringLog
from fleet_admin.steering.selection import Selection
from fleet_admin.steering.steering import Steering
from fleet_admin.steering.views import Actor, CommandResult, DeviceSettingsView, SetResult, SettingsChange, SettingState

__all__ = [
    "Actor",
    "CommandResult",
    "DeviceSettingsView",
    "Selection",
    "SetResult",
    "SettingState",
    "SettingsChange",
    "Steering",
    "SteeringError",
    "SteeringLog",
]
