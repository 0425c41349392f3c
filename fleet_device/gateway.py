"""Gateway: a device that serves applications, with its queue of texts and the local API, up and down."""

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
from fleet_device.api.status.journal import Journal
from fleet_device.client.request import GenerateRequest, RequestContext
from fleet_device.drafters.contract import TextCodec
from fleet_device.errors import EdgeUnavailable
from fleet_device.offline import OfflinePolicy
from fleet_device.service import DeviceService
from fleet_device.steering.commands import LogTail
from fleet_device.steering.remote_settings import RemoteSettings
from fleet_device.steering.steering import Steering
from fleet_device.texts.generate import GeneratedText
from fleet_device.texts.queue import Listener, TextQueue, Ticket
from schemas.grammar import Grammar
from schemas.version import VERSION

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from fleet_device.api.server import ApiServer

_REFUSED: Final = frozenset(LinkFault) - {LinkFault.UNREACHABLE, LinkFault.BUSY}
_DRAINED: Final = "The device's administrator has it take no new texts for now; ask again later, or another device."


class Asked(Enum):
    """What the gateway is asked for while it runs.

    Attributes:
        STOP: End at once.
        DRAIN: End when the open text has ended, or when its time is over; asked again, at once.
        IDLE: From within: nothing is left to write.
        RELOAD: From afar: end like `DRAIN`, and begin anew.
    """

    STOP = auto()
    DRAIN = auto()
    IDLE = auto()
    RELOAD = auto()


class Gateway:
    """A device that serves applications. It is the API's `Backend`.

    Args:
        service: Not started yet.
        remote: What an administrator can set from afar; without it, or where the settings do not let him, nobody
            listens.
        log_tail: What has been logged.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        service: DeviceService,
        *,
        remote: RemoteSettings | None = None,
        log_tail: LogTail | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._reloads = False
        self._log_tail = log_tail or LogTail()
        self._remote = remote
        self._settings = service.settings
        self._clock = clock
        # A SimpleQueue, since signal handlers put into it.
        self._asked: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        self._texts = TextQueue(
            self._write,
            waiting=self._settings.api_waiting,
            at_once=service.texts_at_once,
            clock=clock,
            on_idle=lambda: self.ask(Asked.IDLE),
        )
        self._server: ApiServer | None = None
        self._journal = Journal(texts=self._settings.status_texts, now=service.now)
        self._steering: Steering | None = None
        if remote is not None and self._settings.steering:
            remote.on_change(service.take_settings)
            self._steering = Steering(remote, self, service.link, now=service.now)
            self._steering.attach()

    @property
    def address(self) -> str | None:
        """Where the API is; None if it is turned off."""
        return self._server.address if self._server else None

    @property
    def unreported(self) -> int:
        """Texts written without an edge of which the session log has not been told yet."""
        return self._service.unreported

    def ask(self, what: Asked) -> None:
        """Ask for the end; from a signal handler or any thread."""
        self._asked.put(what)

    def start(self) -> None:
        """Serve the API, and connect as soon as the broker can be reached.

        Raises:
            ConfigurationError: The API's port cannot be taken.
        """
        if self._settings.api_port:
            from fleet_device.api.server import listen  # noqa: PLC0415 - a web server, only where there is to be one

            self.serve(listen(self._settings.api_port))
        if self._steering is not None:
            self._steering.start()
        self._service.start_patiently()
        self._texts.start()

    def serve(self, sock: socket.socket) -> None:
        """Serve the API on a socket that listens."""
        from fleet_device.api.app import create_app  # noqa: PLC0415 - likewise
        from fleet_device.api.server import ApiServer  # noqa: PLC0415

        applications = None if self._remote is None else self._remote.applications
        self._server = ApiServer(create_app(self, self._settings, applications=applications), sock)
        self._server.start()

    def run(
        self, *, on_end: Callable[[], None] = lambda: None, on_drain: Callable[[int], None] = lambda _texts: None
    ) -> None:
        """Return when asked to end: at once, or when the texts that were taken have ended.

        Args:
            on_end: Called once, when the end begins.
            on_drain: Called once if it begins with a drain, with the number of texts that are still to be written.
        """
        asked = self._asked.get()
        self._reloads = asked is Asked.RELOAD
        on_end()
        if asked is Asked.STOP:
            return
        self._service.drain()
        self._texts.close()
        deadline = self._clock() + self._settings.drain_s
        left = self._texts.waiting + self._texts.writing
        _log.info("Draining: %d texts.", left)
        on_drain(left)
        with contextlib.suppress(queue.Empty):
            # Whatever it is: nothing keeps us any longer.
            self._noted(self._asked.get(timeout=max(0.0, deadline - self._clock())))

    @property
    def reloads(self) -> bool:
        """Whether it has ended to begin anew, and nobody has asked for its end since."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._noted(self._asked.get_nowait())
        return self._reloads

    def _noted(self, asked: Asked) -> None:
        self._reloads = self._reloads and asked not in {Asked.STOP, Asked.DRAIN}

    def stop(self) -> None:
        """Give up what is not written, say goodbye, and release everything."""
        self._texts.abandon()
        self._texts.join()
        if self._server is not None:
            self._server.stop()
        if self._steering is not None:
            self._steering.stop()
        self._service.stop()

    # From afar: what commands act on

    @property
    def service(self) -> DeviceService:
        return self._service

    @property
    def log_tail(self) -> LogTail:
        return self._log_tail

    def hold(self, *, drain: bool) -> int:
        """Take no new texts, or begin none, until `resume`; return how many are still to be written."""
        self._texts.hold(_DRAINED if drain else "")
        self._service.drain()
        return self._texts.waiting + self._texts.writing

    def resume(self) -> bool:
        """Take texts again, unless the device is ending; return whether it did not."""
        held = self._texts.held or bool(self._texts.refusal)
        if held and not self._texts.closed:
            self._texts.resume()
            self._service.resume()
        return held

    def reload(self) -> None:
        """End like a drain, to begin anew."""
        self.ask(Asked.RELOAD)

    def settings_report(self) -> dict[str, Any]:
        """Return the settings as an administrator sees them, as JSON values."""
        return {} if self._remote is None else self._remote.report().model_dump(mode="json")

    # Backend

    @property
    def since(self) -> datetime:
        return self._service.since

    def submit(self, prepare: Callable[[TextCodec], GenerateRequest], listener: Listener) -> Ticket:
        """Ask for a text; see `TextQueue.submit`."""
        return self._texts.submit(lambda: prepare(self._service.codec), listener)

    def cancel(self, ticket: Ticket) -> None:
        """Give a text up; see `TextQueue.cancel`."""
        self._texts.cancel(ticket)

    def check_grammar(self, grammar: Grammar) -> None:
        self._service.agent.check_grammar(grammar)

    def spell(self, token: int) -> bytes:
        """Return the bytes of a token; none for control tokens."""
        return self._service.codec.piece(token)

    def targets(self) -> tuple[str, ...]:
        """Return the names of the large models that are there."""
        return tuple(dict.fromkeys(state.target for state in self._service.edges.online()))

    def absence(self, *, for_s: float = 0.0) -> EdgeUnavailable | None:
        """Return why no request can be served now; see `DeviceService.absence`."""
        return self._service.absence(for_s=for_s)

    def health(self) -> dict[str, Any]:
        """Return how the device is, as JSON values."""
        service, settings = self._service, self._settings
        if self._texts.broken:
            status = "failed"
            code: str | None = "internal_error"
            reason: str | None = "The thread that writes texts has ended; see the log, and restart the device."
        else:
            missing = self.absence()
            reason, code = (None, None) if missing is None else (str(missing), missing.code)
            absent = "refused" if code in _REFUSED else "waiting"
            absent = "local" if settings.offline is OfflinePolicy.LOCAL else absent
            held = self._texts.closed or self._texts.held or self._texts.refusal
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
            },
            "broker": {
                "host": settings.broker.host,
                "port": settings.broker.port,
                "connected": service.connected,
            },
            "edges": [
                {
                    "edge": state.edge,
                    "presence": state.presence.value,
                    "target": state.target,
                    "vocabulary": state.vocabulary,
                    "software": state.software,
                }
                for state in service.edges.known()
            ],
            "sessions": {
                "writing": self._texts.writing,
                "at_once": self._texts.at_once,
                "waiting": self._texts.waiting,
                "ended": service.tally.sessions,
                "tokens": service.tally.tokens,
            },
        }

    def status(self) -> dict[str, Any]:
        """Return how the device is and what it has written, as JSON values."""
        return {**self.health(), "offline": self._settings.offline.value, **self._journal.json()}

    def _write(self, request: GenerateRequest, context: RequestContext) -> GeneratedText:
        outages = request.outages
        if outages.policy is OfflinePolicy.FAIL and (missing := self.absence(for_s=outages.absence_s)) is not None:
            raise missing
        text = self._service.write(request, context)
        self._journal.note(text)
        return text
