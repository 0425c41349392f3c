"""Device: drafter, session, pacing, agent and the local API.

The names below are what applications use; each is imported when it is first asked for, so that `import fleet_device`
needs neither llama.cpp nor a web server.
"""

from typing import TYPE_CHECKING

from fleet_common.lazy import lazy_names

if TYPE_CHECKING:
    from fleet_common.mqtt.errors import ConnectFailed
    from fleet_common.settings import SettingsError
    from fleet_device.device import AsyncDevice, Device
    from fleet_device.drafters.contract import DrafterError
    from fleet_device.errors import (
        DeviceClosed,
        DeviceError,
        EdgeUnavailable,
        InvalidRequest,
        PromptTooLong,
        ProtocolViolation,
        RequestTimeout,
        SessionFailed,
        SessionRefused,
        TextCancelled,
    )
    from fleet_device.requests.chat import ChatError
    from fleet_device.requests.generate import GeneratedText
    from fleet_device.requests.prompt import Prompt, TextOptions
    from fleet_device.requests.queue import AsyncTextStream, TextStream
    from fleet_device.requests.structured import ChatMessage, ToolCall
    from fleet_device.session.sequence import TokenOrigin
    from fleet_device.settings import DeviceSettings
    from schemas.errors import FleetError
    from schemas.policy import Grammar

__all__ = [
    "AsyncDevice",
    "AsyncTextStream",
    "ChatError",
    "ChatMessage",
    "ConnectFailed",
    "Device",
    "DeviceClosed",
    "DeviceError",
    "DeviceSettings",
    "DrafterError",
    "EdgeUnavailable",
    "FleetError",
    "GeneratedText",
    "Grammar",
    "InvalidRequest",
    "Prompt",
    "PromptTooLong",
    "ProtocolViolation",
    "RequestTimeout",
    "SessionFailed",
    "SessionRefused",
    "SettingsError",
    "TextCancelled",
    "TextOptions",
    "TextStream",
    "TokenOrigin",
    "ToolCall",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "AsyncDevice": "fleet_device.device",
            "AsyncTextStream": "fleet_device.requests.queue",
            "ChatError": "fleet_device.requests.chat",
            "ChatMessage": "fleet_device.requests.chat",
            "ConnectFailed": "fleet_common.mqtt.errors",
            "Device": "fleet_device.device",
            "DeviceClosed": "fleet_device.errors",
            "DeviceError": "fleet_device.errors",
            "DeviceSettings": "fleet_device.settings",
            "DrafterError": "fleet_device.drafters.contract",
            "EdgeUnavailable": "fleet_device.errors",
            "FleetError": "schemas.errors",
            "GeneratedText": "fleet_device.requests.generate",
            "Grammar": "schemas.policy",
            "InvalidRequest": "fleet_device.errors",
            "Prompt": "fleet_device.requests.prompt",
            "PromptTooLong": "fleet_device.errors",
            "ProtocolViolation": "fleet_device.errors",
            "RequestTimeout": "fleet_device.errors",
            "SessionFailed": "fleet_device.errors",
            "SessionRefused": "fleet_device.errors",
            "SettingsError": "fleet_common.settings",
            "TextCancelled": "fleet_device.errors",
            "TextOptions": "fleet_device.requests.prompt",
            "TextStream": "fleet_device.requests.queue",
            "TokenOrigin": "fleet_device.session.sequence",
            "ToolCall": "fleet_device.requests.structured",
        },
    )
