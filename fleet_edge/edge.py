"""Edge: verifies a fleet's drafts with a large language model, as one object.

::

    from fleet_edge import Edge

    Edge.from_config("edge.toml").run()
"""

import math
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Final, Self

from fleet_common.mqtt.errors import LinkError
from fleet_common.mqtt.link import Link, Will
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from fleet_common.settings import load_settings
from fleet_edge.errors import EdgeError
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.registry import load_draft, load_verifier, read_chat_format
from schemas.control import MAX_LABEL, EdgeState, Presence, encode_json
from schemas.errors import FleetError
from schemas.names import VERSION
from schemas.topics import Topic, build

if TYPE_CHECKING:
    from fleet_edge.service import EdgeService
    from fleet_edge.verifiers.contract import TargetInfo, Verifier

_CONNECT_S: Final = 10.0
_PROGRESS_S: Final = 1.0
_LOGGED_S: Final = 5.0
"""Intervals in which devices, and the session log, learn how much of the target model is loaded."""

CONFIG_VARIABLE: Final = "FLEET_EDGE_CONFIG"
"""Environment variable that names the TOML file."""


class Edge:
    """An edge: `run` it until it is stopped, or use it as a context manager, which runs it on a thread.

    An `Edge` runs once; make another one to run again.

    Args:
        settings: The configuration.
        verifier: The target model; loaded according to the settings if left out.
        make_link: Makes the connection to the broker.
        warm_prompts: Tokens of prompts to compute ahead and keep for all devices; `fleet edge run` reads them from the
            file that the settings name.
        now: The wall clock (UTC).
    """

    def __init__(
        self,
        settings: EdgeSettings,
        *,
        verifier: "Verifier | None" = None,
        make_link: Callable[[LinkSettings], Link] = PahoLink,
        warm_prompts: Sequence[Sequence[int]] = (),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.settings = settings
        self._verifier = verifier
        self._loaded = False  # loaded, and shut down, by this object
        self._make_link = make_link
        self._warm_prompts = warm_prompts
        self._now = now
        self._begun = threading.Lock()
        self._checked = False
        self._stop = threading.Event()
        self._drain = threading.Event()
        self._whole_drain = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @classmethod
    def from_config(cls, path: str | os.PathLike[str] | None = None, **settings: object) -> Self:
        """Return an edge configured by a TOML file, the environment and the arguments.

        Args:
            path: TOML file; without it the environment variable `FLEET_EDGE_CONFIG` may name one.
            settings: Settings by name, overriding those of the file; a section is a mapping: `broker={"host":
                "10.0.0.1"}`.

        Raises:
            SettingsError: The file cannot be read, or a setting cannot work.
        """
        path = path or os.environ.get(CONFIG_VARIABLE)
        return cls(load_settings(EdgeSettings, config=Path(path) if path else None, flags=settings, by_program=True))

    @property
    def target(self) -> "TargetInfo":
        """The target model, once it is loaded.

        Raises:
            EdgeError: It is not.
        """
        if self._verifier is None:
            raise EdgeError("The edge has not loaded its target model yet; run it first.")
        return self._verifier.info

    def check(self) -> None:
        """Check all that can be checked before the target model is loaded; `run` does so too.

        Raises:
            SettingsError: Settings cannot work; a line for each.
            ConnectFailed: The broker cannot be reached.
        """
        # Imports SQLAlchemy, which configuring an edge does not need.
        from fleet_edge.preflight import preflight  # noqa: PLC0415

        preflight(self.settings, make_link=self._make_link)
        self._checked = True

    def run(
        self,
        *,
        on_online: Callable[[], None] = lambda: None,
        on_step: Callable[[], None] = lambda: None,
        on_end: Callable[[], None] = lambda: None,
        on_drain: Callable[[int], None] = lambda _sessions: None,
    ) -> int:
        """Load the target model, connect, and verify until stopped by `stop`, `drain` or a signal.

        On the main thread SIGTERM drains: open sessions may end first. SIGINT, or a second SIGTERM, ends at once. Open
        sessions then go on at another edge with the same target model, or at this one once it is back. Before the
        target model is exchanged, SIGUSR1 drains without a limit of time, so that they end with theirs; a SIGTERM then
        limits it.

        Args:
            on_online: Called when the edge takes sessions.
            on_step: Called after every step of the loop, at least ten times a second.
            on_end: Called once, when the end begins.
            on_drain: Called once when a drain begins, with the number of open sessions.

        Returns:
            Number of sessions that were still open at the end, and migrate.

        Raises:
            SettingsError: Settings cannot work; a line for each.
            VerifierError: The target model cannot be loaded.
            StoreError: The session log cannot be opened.
            ConnectFailed: The broker cannot be reached.
            EdgeError: The edge has been run before.
        """
        service = self._start()
        try:
            with self._signals():
                on_online()
                service.run(
                    self._stop,
                    drain=self._drain,
                    whole_drain=self._whole_drain,
                    on_step=on_step,
                    on_end=on_end,
                    on_drain=on_drain,
                )
        finally:
            handed_over = self._end(service)
        return handed_over

    def drain(self, *, whole: bool = False) -> None:
        """Accept no new sessions, and end once the open ones have, or after `drain_s` seconds. Call it from any thread.

        With `whole` there is no limit of time: sessions end with the target model that they began with.
        """
        (self._whole_drain.set if whole else self._whole_drain.clear)()
        self._drain.set()

    def stop(self) -> None:
        """End at once; open sessions migrate. Call it from any thread."""
        self._stop.set()

    def __enter__(self) -> Self:
        """Load the target model, connect, and verify on a thread. Raises what `run` raises."""
        service = self._start()
        self._thread = threading.Thread(target=self._verify, args=(service,), name="edge")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        assert self._thread is not None
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure

    def _start(self) -> "EdgeService":
        if not self._begun.acquire(blocking=False):
            raise EdgeError("This edge has been run already; create another one to run it again.")
        if self._verifier is None:
            if not self._checked:
                self.check()
            with self._announced_as_loading() as on_progress:
                self._verifier = load_verifier(self.settings, on_progress)
            self._loaded = True
        draft = load_draft(self.settings, self._verifier)
        # Imported late, because it takes seconds.
        from fleet_edge.service import EdgeService  # noqa: PLC0415

        service = EdgeService(
            self.settings,
            self._verifier,
            make_link=self._make_link,
            draft_verifier=draft,
            chat_format=read_chat_format(self.settings, self._verifier.info.end_tokens) if self._loaded else None,
            now=self._now,
        )
        service.start()
        service.orchestrator.scheduler.warm.add(self._warm_prompts)
        return service

    @contextmanager
    def _announced_as_loading(self) -> Iterator[Callable[[float], None]]:
        """Announce that this edge loads its target model, which may take minutes; until it is online, or fails.

        Yields a function that takes the share that is loaded.
        """
        settings = self.settings
        topic = build(Topic.EDGE_STATE, fleet=settings.fleet, edge=settings.edge)
        offline = EdgeState(
            presence=Presence.OFFLINE,
            software=VERSION,
            edge=settings.edge,
            target=str(settings.target)[:MAX_LABEL],
            vocabulary="",
            since=self._now(),
        )
        will = Will(topic, encode_json(offline))
        link = self._make_link(settings.broker.link(settings.fleet, settings.edge, will=will))

        def publish(state: EdgeState) -> None:
            with suppress(LinkError):  # it is published again after a reconnect
                link.publish(topic, encode_json(state), retain=True, content_type="application/json")

        percent, published_at, loaded = 0, -math.inf, threading.Event()

        def announce() -> None:
            publish(offline.model_copy(update={"loading": percent}))

        def note(share: float) -> None:
            nonlocal percent, published_at
            percent, now = max(percent, int(100 * share)), time.monotonic()
            if now - published_at >= _PROGRESS_S:
                published_at = now
                announce()

        def log() -> None:
            # Imported here, because it takes seconds, in which the model is loaded.
            from fleet_edge.session_log.database import Store  # noqa: PLC0415
            from fleet_edge.session_log.records import loading_record  # noqa: PLC0415

            store = Store(settings.db)
            while not loaded.is_set():
                with suppress(FleetError):  # the log is complete without it
                    store.apply([loading_record(settings.edge, percent, self._now())])
                loaded.wait(_LOGGED_S)
            store.close()

        log_thread = threading.Thread(target=log, name="log-loading", daemon=True)
        log_thread.start()
        link.on_connection(lambda up: announce() if up else None)
        try:
            link.start(timeout_s=_CONNECT_S)
            yield note
        except BaseException:
            publish(offline)
            raise
        finally:
            loaded.set()
            link.stop()
            log_thread.join(_CONNECT_S)

    def _end(self, service: "EdgeService") -> int:
        from fleet_edge.verifiers.contract import RunsElsewhere  # noqa: PLC0415 - see `_start`

        handed_over = service.stop()
        if self._loaded and isinstance(self._verifier, RunsElsewhere):
            self._verifier.shut_down()
        return handed_over

    def _verify(self, service: "EdgeService") -> None:
        try:
            try:
                service.run(self._stop, drain=self._drain, whole_drain=self._whole_drain)
            finally:
                self._end(service)
        except BaseException as error:  # noqa: BLE001 - raised again where the edge is left
            self._failure = error

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        arrived: queue.SimpleQueue[int] = queue.SimpleQueue()

        def note(number: int, _frame: FrameType | None) -> None:
            # It may interrupt a handler that sets an event and holds its lock; this `put` takes none.
            arrived.put(number)

        def obey() -> None:
            while number := arrived.get():
                limited = self._drain.is_set() and not self._whole_drain.is_set()
                if number == signal.SIGUSR1:
                    self.drain(whole=not limited)
                elif number == signal.SIGTERM and not limited:
                    self.drain()
                else:
                    self.stop()

        obeyed = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, note) for number in obeyed}
        thread = threading.Thread(target=obey, name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            arrived.put(0)
            thread.join()
