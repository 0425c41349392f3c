"""Steering: remote settings and commands for devices, labels, and the audit log of administrators."""

from fleet_admin.steering.log import SteeringLog
from fleet_admin.steering.planning import (
    Actor,
    CommandResult,
    DeviceSettingsView,
    Selection,
    SettingsChange,
    SettingState,
    SteeringError,
)
from fleet_admin.steering.steering import Steering

__all__ = [
    "Actor",
    "CommandResult",
    "DeviceSettingsView",
    "Selection",
    "SettingState",
    "SettingsChange",
    "Steering",
    "SteeringError",
    "SteeringLog",
]
