"""Device: generates text with a fleet's large language model, as one object.

::

    from fleet_device import Device

    with Device.from_config("device.toml") as device:
        print(device.generate("Why is the sky blue?").text)
        for piece in device.stream("Tell me a story."):
            print(piece, end="")

`AsyncDevice` is the same for asyncio.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Self, Unpack

from fleet_common.mqtt.link import Link
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from fleet_common.settings import check_all, load_settings
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.model_file import load_drafter, locate_model
from fleet_device.errors import ConfigurationError, DeviceClosed, InvalidRequest, SessionRefused
from fleet_device.requests.generate import GeneratedText, GenerateRequest
from fleet_device.requests.prompt import PreparedRequest, Prompt, TextOptions, prepare_request
from fleet_device.requests.queue import AsyncTextStream, RequestQueue, TextStream
from fleet_device.service import DeviceService
from fleet_device.settings import MODEL_DRAFTER, DeviceSettings, OfflinePolicy
from schemas.control import Presence


def preflight(settings: DeviceSettings, *, serves: bool) -> None:
    """Check all that can be checked before the draft model is loaded; a broker may still be away.

    `serves`: the local API is to run. Raise SettingsError with a line for each problem.
    """
    broker = settings.broker
    files = {
        "broker.ca": broker.ca,
        "broker.certificate": broker.certificate,
        "broker.key": broker.key,
        "api_certificate": settings.api_certificate if serves else None,
    }
    checks: dict[str, Callable[[], object]] = {
        "model": partial(locate_model, settings.model, folder=settings.models_dir),
        "target_vocabulary": partial(_check_vocabulary, settings.target_vocabulary),
        "offline": partial(_check_writes_alone, settings),
        **{name: partial(_check_readable, path) for name, path in files.items() if path is not None},
    }
    if serves and settings.api_listen:
        checks["api_listen"] = partial(_check_free, settings)
    check_all(settings, checks)


def _check_vocabulary(path: Path | None) -> None:
    if path is not None and not path.expanduser().is_file():
        raise ConfigurationError(
            f"There is no file {path}; make it from the target's GGUF with 'fleet models vocabulary', and copy it here."
        )


def _check_writes_alone(settings: DeviceSettings) -> None:
    if settings.offline is OfflinePolicy.LOCAL and settings.drafter != MODEL_DRAFTER:
        raise ConfigurationError(
            f"The drafter {settings.drafter!r} has no model to continue alone; set drafter = {MODEL_DRAFTER!r}, "
            "or offline to 'wait' or 'fail'."
        )


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigurationError(f"The file {path} cannot be read: {error.strerror}.") from error


def _check_free(settings: DeviceSettings) -> None:
    from fleet_device.api.listening import listen_as, release  # noqa: PLC0415 - a web server, only where there is one

    release(listen_as(settings))


CONFIG_VARIABLE: Final = "FLEET_DEVICE_CONFIG"
"""Environment variable that names the TOML file."""


def _check_and_load(settings: DeviceSettings) -> Drafter:
    preflight(settings, serves=False)
    return load_drafter(settings)


@dataclass(frozen=True, slots=True)
class _Open:
    service: DeviceService
    queue: RequestQueue

    def check_grammar(self, prepared: PreparedRequest) -> None:
        """Raise InvalidRequest if a request's grammar cannot be used; may take seconds."""
        if (grammar := prepared.policy.grammar) is not None:
            try:
                self.service.agent.check_grammar(grammar)
            except SessionRefused as error:
                raise InvalidRequest(str(error)) from None


class _AnyDevice:
    """Common part of `Device` and `AsyncDevice`: settings, and a service while the device is open."""

    def __init__(
        self,
        settings: DeviceSettings,
        *,
        load: Callable[[DeviceSettings], Drafter] = _check_and_load,
        make_link: Callable[[LinkSettings], Link] = PahoLink,
    ) -> None:
        self.settings = settings
        self._load = load
        self._make_link = make_link
        self._changing = threading.Lock()
        self._open: _Open | None = None

    @classmethod
    def from_config(cls, path: str | os.PathLike[str] | None = None, **settings: object) -> Self:
        """Return a device as a TOML file, the environment and the arguments configure it; not open yet.

        Args:
            path: TOML file; without it the environment variable `FLEET_DEVICE_CONFIG` may name one.
            settings: Settings by name, which override those of the file; a section is a mapping:
                `broker={"host": "10.0.0.1"}`.

        Raises:
            SettingsError: The file cannot be read, or a setting cannot work.
        """
        path = path or os.environ.get(CONFIG_VARIABLE)
        return cls(load_settings(DeviceSettings, config=Path(path) if path else None, flags=settings, by_program=True))

    def _start(self) -> None:
        with self._changing:
            if self._open is not None:
                return
            drafter = self._load(self.settings)
            try:
                service = DeviceService(self.settings, drafter, self._make_link)
            except BaseException:
                drafter.close()
                raise
            service.start()
            queue = RequestQueue(service.generate, at_once=service.requests_at_once)
            queue.start()
            self._open = _Open(service, queue)

    def _end(self) -> None:
        with self._changing:
            if (closing := self._open) is None:
                return
            self._open = None
            closing.queue.abandon()
            closing.queue.join()
            closing.service.stop(Presence.CLOSED)  # a program has ended; a service is to come back

    def _count(self, prompt: Prompt, *, raw: bool) -> int:
        service = self._require_open().service
        return len(service.encode(prepare_request(prompt, self.settings, raw=raw).encode, self.settings.target).prompt)

    @property
    def drafter(self) -> Drafter:
        """The draft model; raises `DeviceClosed` if the device is not open."""
        return self._require_open().service.drafter

    def _require_open(self) -> _Open:
        if (opened := self._open) is None:
            raise DeviceClosed("The device is not open; use it in a `with` statement, or open it first.")
        return opened


class Device(_AnyDevice):
    """A device of a fleet. Use it as a context manager, or `open` it and `close` it.

    Several threads may use it. Requests run in the order in which they were made, as many at once as the setting
    `requests_at_once` says.
    """

    def open(self) -> None:
        """Load the draft model, connect, and announce that this device is online. Idempotent.

        Raises:
            SettingsError: Settings cannot work, the draft model's among them; a line for each.
            DrafterError: The draft model cannot be loaded.
            ConnectFailed: The broker cannot be reached.
        """
        self._start()

    def close(self) -> None:
        """Cancel all requests, disconnect, and release everything. Idempotent."""
        self._end()

    def generate(self, prompt: Prompt, **options: Unpack[TextOptions]) -> GeneratedText:
        """Run a request, and return its output when it is complete.

        A broker or an edge that restarts meanwhile costs time; if it stays away, the request fails after `offline_s`
        seconds. With `offline="wait"` it continues as soon as one is back, however long that takes; with
        `offline="local"` the draft model continues alone, and the result's `verified` is False.

        Args:
            prompt: A text, the messages of a chat, or token ids.
            options: See `TextOptions`.

        Raises:
            InvalidRequest: The prompt or an option cannot be used.
            EdgeUnavailable: No edge answers, and the generation may not go on without.
            SessionRefused: The edge refused the request; `code` says why.
            SessionFailed: The session failed.
            ProtocolViolation: The edge answered something that no correct edge answers.
            ChatError: The draft model has no chat template (`raw=True` needs none), or it declines the messages.
            DrafterError: The draft model failed.
            DeviceClosed: The device is not open.
            TextCancelled: The device was closed meanwhile.
            RequestTimeout: The text was not complete within `timeout`.
        """
        with self.stream(prompt, **options) as stream:
            return stream.result()

    def stream(self, prompt: Prompt, **options: Unpack[TextOptions]) -> TextStream:
        """Begin a request, and return an iterator over its output as it is verified.

        Leaving the loop, or closing the stream, cancels the request; use it in a `with` statement if other code may end
        before the loop does.

        Args:
            prompt: A text, the messages of a chat, or token ids.
            options: See `TextOptions`.

        Raises:
            InvalidRequest: The prompt or an option cannot be used.
            DeviceClosed: The device is not open.
        """
        prepared = prepare_request(prompt, self.settings, **options)
        opened = self._require_open()
        opened.check_grammar(prepared)
        return TextStream(
            opened.queue,
            lambda: opened.service.encode(prepared.encode, prepared.target),
            timeout=options.get("timeout"),
        )

    def count_tokens(self, prompt: Prompt, *, raw: bool = False) -> int:
        """Return the number of tokens of a prompt, chat template included.

        Args:
            prompt: A text, the messages of a chat, or token ids.
            raw: Whether a text is taken without the chat template.

        Raises:
            InvalidRequest: The prompt cannot be used.
            ChatError: The draft model has no chat template, or it declines the messages.
            DeviceClosed: The device is not open.
        """
        return self._count(prompt, raw=raw)

    def wait_for_edge(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds for an edge of the fleet to be online; False if none is."""
        return self._require_open().service.edges.wait_online(timeout_s)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncDevice(_AnyDevice):
    """A device of a fleet for asyncio. Use it in `async with`, or `open` it and `close` it.

    Options and errors are those of `Device`. A request is cancelled with the task that waits for it.
    """

    async def open(self) -> None:
        """Load the draft model, connect, and announce that this device is online. Idempotent."""
        await asyncio.to_thread(self._start)

    async def close(self) -> None:
        """Cancel all requests, disconnect, and release everything. Idempotent."""
        await asyncio.to_thread(self._end)

    async def generate(self, prompt: Prompt, **options: Unpack[TextOptions]) -> GeneratedText:
        """Run a request, and return its output when it is complete; see `Device.generate`."""
        async with self.stream(prompt, **options) as stream:
            return await stream.result()

    def stream(self, prompt: Prompt, **options: Unpack[TextOptions]) -> AsyncTextStream:
        """Begin a request, and return an asynchronous iterator over its output; see `Device.stream`."""
        prepared = prepare_request(prompt, self.settings, **options)
        opened = self._require_open()

        def prepare() -> GenerateRequest:
            opened.check_grammar(prepared)  # here, because it would stop the event loop
            return opened.service.encode(prepared.encode, prepared.target)

        return AsyncTextStream(opened.queue, prepare, timeout=options.get("timeout"))

    async def count_tokens(self, prompt: Prompt, *, raw: bool = False) -> int:
        """Return the number of tokens of a prompt, chat template included; see `Device.count_tokens`."""
        return await asyncio.to_thread(self._count, prompt, raw=raw)

    async def wait_for_edge(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds for an edge of the fleet to be online; False if none is."""
        return await asyncio.to_thread(self._require_open().service.edges.wait_online, timeout_s)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
