"""Gateway: a device that serves applications, with its queue of requests and local API."""

import contextlib
import logging
import queue
import socket
import time
from collections.abc import Callable
from datetime import datetime
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final

from fleet_common.mqtt.errors import LinkFault
from fleet_device.drafters.contract import TextCodec
from fleet_device.errors import EdgeUnavailable
from fleet_device.requests.generate import GeneratedText, GenerateRequest, RequestContext
from fleet_device.requests.queue import Listener, RequestQueue, Ticket
from fleet_device.service import DeviceService
from fleet_device.settings import OfflinePolicy
from fleet_device.steering.commands import LogTail, SteeringListener
from fleet_device.steering.remote_settings import SteeredSettings
from schemas.names import VERSION
from schemas.policy import Grammar

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from fleet_device.api.listening import ApiServer

_REFUSED: Final = frozenset(LinkFault) - {LinkFault.UNREACHABLE, LinkFault.BUSY}
_DRAINED: Final = "The device's administrator has stopped new requests for now; try again later, or another device."


class Asked(Enum):
    """Requests to the running gateway.

    `DRAIN` ends when the running requests have ended or their time is over, at once if asked again. `RELOAD`, from an
    administrator, does the same and starts again. `IDLE` is internal: all requests have ended.
    """

    STOP = auto()
    DRAIN = auto()
    IDLE = auto()
    RELOAD = auto()


class Gateway:
    """A device that serves applications. It is the API's `Backend`.

    `service` is not started yet; without `remote`, or without the setting `steering`, no administrator can set
    anything.
    """

    def __init__(
        self,
        service: DeviceService,
        *,
        remote: SteeredSettings | None = None,
        log_tail: LogTail | None = None,
    ) -> None:
        self.service = service
        self._reloads = False
        self.log_tail = log_tail or LogTail()
        self._settings = service.settings
        # A SimpleQueue, since signal handlers put into it.
        self._asked: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        self._queue = RequestQueue(
            self._generate,
            waiting=self._settings.api_waiting,
            at_once=service.requests_at_once,
            on_idle=lambda: self.request_end(Asked.IDLE),
        )
        self._server: ApiServer | None = None
        self._steering: SteeringListener | None = None
        if remote is not None and self._settings.steering:
            remote.on_change(service.take_settings)
            self._steering = SteeringListener(remote, self, service.link, now=service.now)
            self._steering.attach()

    @property
    def address(self) -> str | None:
        """URL of the API; None if it is turned off."""
        return self._server.address if self._server else None

    def request_end(self, how: Asked) -> None:
        """Make `run` end or reload. Call it from a signal handler or any thread."""
        self._asked.put(how)

    def start(self) -> None:
        """Serve the API, and connect as soon as possible; raise HttpServerError if the port cannot be used."""
        if self._settings.api_listen:
            from fleet_device.api.listening import listen_as  # noqa: PLC0415 - a web server, only where there is to be one

            self.serve(listen_as(self._settings))
        if self._steering is not None:
            self._steering.start()
        self.service.start_patiently()
        self._queue.start()

    def serve(self, sock: socket.socket) -> None:
        from fleet_device.api.app import create_app  # noqa: PLC0415 - likewise
        from fleet_device.api.listening import ApiServer  # noqa: PLC0415 - likewise

        app, certificate = create_app(self, self._settings), self._settings.api_certificate
        self._server = ApiServer(app, sock, certificate=certificate and certificate.expanduser())
        self._server.start()

    def run(
        self, *, on_end: Callable[[], None] = lambda: None, on_drain: Callable[[int], None] = lambda _requests: None
    ) -> None:
        """Return when asked to end: at once, or when the accepted requests have ended.

        `on_end` is called once, when the end begins; `on_drain` if it begins with a drain, with the number of requests
        that are left.
        """
        asked = self._asked.get()
        self._reloads = asked is Asked.RELOAD
        on_end()
        if asked is Asked.STOP:
            return
        self.service.drain()
        self._queue.close()
        deadline = time.monotonic() + self._settings.drain_s
        left = self._queue.waiting + self._queue.running
        _log.info("Draining: %d requests.", left)
        on_drain(left)
        with contextlib.suppress(queue.Empty):
            # Any request ends the wait.
            self._noted(self._asked.get(timeout=max(0.0, deadline - time.monotonic())))

    @property
    def reloads(self) -> bool:
        """The gateway has ended in order to start again, and was not asked to stop since."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._noted(self._asked.get_nowait())
        return self._reloads

    def _noted(self, asked: Asked) -> None:
        self._reloads = self._reloads and asked not in {Asked.STOP, Asked.DRAIN}

    def stop(self) -> None:
        self._queue.abandon()
        self._queue.join()
        if self._server is not None:
            self._server.stop()
        if self._steering is not None:
            self._steering.stop()
        self.service.stop()

    # For remote commands

    def hold(self) -> int:
        """Accept no new requests until `resume`; return how many are left."""
        self._queue.refusal = _DRAINED
        self.service.drain()
        return self._queue.waiting + self._queue.running

    def resume(self) -> bool:
        """Accept requests again, unless the device is ending; return whether it did not."""
        held = bool(self._queue.refusal)
        if held and not self._queue.closed:
            self._queue.refusal = ""
            self.service.resume()
        return held

    def reload(self) -> None:
        self.request_end(Asked.RELOAD)

    # Backend

    @property
    def since(self) -> datetime:
        return self.service.since

    def submit(
        self, prepare: Callable[[TextCodec], GenerateRequest], listener: Listener, *, target: str = ""
    ) -> Ticket:
        any_name = target != self._settings.target  # what an application wrote, not what the operator did
        return self._queue.submit(lambda: self.service.encode(prepare, target, any_name=any_name), listener)

    def cancel(self, ticket: Ticket) -> None:
        self._queue.cancel(ticket)

    def check_grammar(self, grammar: Grammar) -> None:
        self.service.agent.check_grammar(grammar)

    @property
    def codec(self) -> TextCodec:
        return self.service.formats.codec(self.service.codec)

    @property
    def draft_model(self) -> str:
        return self.service.drafter.name

    @property
    def context(self) -> int:
        return self.service.drafter.context

    def targets(self, *, online: bool = True) -> tuple[str, ...]:
        return self.service.edges.targets(online=online)

    def absence(self, *, for_s: float = 0.0) -> EdgeUnavailable | None:
        return self.service.absence(for_s=for_s)

    def await_edge(self) -> None:
        self.service.edges.wait_online(self._settings.outages().absence_s)

    def health(self) -> dict[str, Any]:
        service, settings = self.service, self._settings
        if self._queue.broken:
            status = "failed"
            code: str | None = "internal_error"
            reason: str | None = "The thread that runs requests has ended; see the log, and restart the device."
        else:
            missing = self.absence()
            reason, code = (None, None) if missing is None else (str(missing), missing.code)
            absent = "refused" if code in _REFUSED else "waiting"
            absent = "local" if settings.offline is OfflinePolicy.LOCAL else absent
            held = self._queue.closed or self._queue.refusal
            status = "draining" if held else "ok" if missing is None else absent
        return {
            "status": status,
            "code": code,
            "reason": reason,
            "software": VERSION,
            "fleet": settings.fleet,
            "device": settings.device,
            "since": service.since.isoformat(),
            "drafter": {
                "name": service.drafter.name,
                "quantization": service.drafter.quantization,
                "context": service.drafter.context,
                "vocabulary": str(service.drafter.vocabulary),
                "chat_format": service.formats.own_name,
            },
            "broker": {"host": settings.broker.host, "port": settings.broker.port, "connected": service.link.connected},
            "edges": [
                {
                    "edge": state.edge,
                    "presence": state.presence.value if state.loading is None else "loading",
                    "loading": state.loading,
                    "target": state.target,
                    "target_id": state.target_id,
                    "vocabulary": state.vocabulary,
                    "software": state.software,
                    "chat_format": state.chat_format,
                }
                for state in service.edges.known()
            ],
            "sessions": {
                "writing": self._queue.running,
                "at_once": self._queue.at_once,
                "waiting": self._queue.waiting,
                "ended": service.tally.sessions,
                "tokens": service.tally.tokens,
            },
        }

    def status(self) -> dict[str, Any]:
        latest, heat = self.service.tally.latest, self.service.heat
        return {
            **self.health(),
            "offline": self._settings.offline.value,
            **latest.model_dump(exclude={"sessions", "tokens"}),
            "unverified": latest.unverified or 0,
            "temperature_c": heat.temperature_c,
            "throttled": heat.throttled,
        }

    def _generate(self, request: GenerateRequest, context: RequestContext) -> GeneratedText:
        outages = request.outages
        if outages.policy is OfflinePolicy.FAIL and (missing := self.absence(for_s=outages.absence_s)) is not None:
            raise missing
        return self.service.generate(request, context)
