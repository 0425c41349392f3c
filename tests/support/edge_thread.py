"""Edge on a thread of this process, without a session log: all of the real edge but the model and the database."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

from fleet_common.mqtt.link import Link
from fleet_common.mqtt.paho_link import PahoLink
from fleet_edge.assembly import assemble
from fleet_edge.limits import QuotaSettings
from fleet_edge.session_log.records import Record
from fleet_edge.sessions.table import HANDLES
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import Verifier
from tests.support.waiting import PATIENCE_S

NO_QUOTAS: Final = QuotaSettings(
    drafts_per_s=1e6,
    opens_per_min=1e6,
    prompt_s_per_min=1e9,
    new_tokens_per_min=1e9,
    uplink_bytes_per_s=1e9,
)
"""Quotas that no benchmark reaches: few devices use all of an edge."""


class NoLog:
    def put(
        self,
        record: Record,  # noqa: ARG002
        *,
        urgent: bool = False,  # noqa: ARG002
        then: Callable[[], None] | None = None,
    ) -> None:
        if then is not None:
            then()


@contextmanager
def edge_thread(
    settings: EdgeSettings,
    verifier: Verifier,
    *,
    link: Link | None = None,
    first_handle: int | None = None,
    draft_verifier: Verifier | None = None,
) -> Iterator[None]:
    """Serve a fleet while the context lasts; on entry the edge takes sessions."""
    if link is None:
        link = PahoLink(settings.broker.link(settings.fleet, settings.edge, will=None))
    orchestrator = assemble(
        settings,
        verifier=verifier,
        draft_verifier=draft_verifier,
        link=link,
        sink=NoLog(),
        clock=time.monotonic,
        now=lambda: datetime.now(UTC),
        first_handle=secrets.randbelow(HANDLES) if first_handle is None else first_handle,
    )
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            orchestrator.step(wait_s=0.1)
        orchestrator.finish_step()

    thread = threading.Thread(target=serve, name=f"edge-{settings.edge}", daemon=True)
    link.start(timeout_s=PATIENCE_S)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        link.stop()
