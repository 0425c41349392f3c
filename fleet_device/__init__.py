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
    from fleet_device.requests.generate import GeneratedText
    from fleet_device.requests.prompt import Prompt, TextOptions
    from fleet_device.requests.queue import AsyncTextStream, TextStream
    from fleet_device.requests.structured import ChatMessage, ToolCall
    from fleet_device.requests.template import ChatError
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
    __getattr__, __dir__ = lazy_names(__name__, __file__)
