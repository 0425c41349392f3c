"""How the parts of an edge are put together: the same for the service, the tests and the benchmarks."""

from collections.abc import Callable
from datetime import datetime

from fleet_edge.admission import Terms
from fleet_edge.expiry import Expiry
from fleet_edge.gathering import Gathering
from fleet_edge.intake import Inbox, Intake
from fleet_edge.orchestrator import Orchestrator
from fleet_edge.publisher import Publisher
from fleet_edge.reception import Reception
from fleet_edge.recorder import Recorder, Sink
from fleet_edge.scheduler import Budget, Scheduler
from fleet_edge.sessions import SessionTable
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifier.protocol import Verifier
from fleet_link.link import Link

__all__ = ["assemble"]


def assemble(
    settings: EdgeSettings,
    *,
    verifier: Verifier,
    link: Link,
    sink: Sink,
    clock: Callable[[], float],
    now: Callable[[], datetime],
) -> Orchestrator:
    """Return an orchestrator whose intake is subscribed on the link.

    Args:
        settings: The configuration.
        verifier: The target model.
        link: To the broker; not started yet.
        sink: The session log.
        clock: Monotonic seconds.
        now: The wall clock (UTC).
    """
    inbox = Inbox()
    sessions = SessionTable(settings.lease_s, settings.max_sessions, settings.max_sessions_per_device)
    budget = Budget(tokens=settings.step_tokens, prefill_chunk=settings.prefill_chunk)
    scheduler = Scheduler(verifier, budget, Gathering(settings.gather_share))
    publisher = Publisher(link, settings.fleet)
    recorder = Recorder(sink, settings.edge, now, settings.trace_share)
    reception = Reception(
        settings.edge,
        sessions,
        scheduler,
        publisher,
        recorder,
        Expiry(now),
        clock,
        terms=Terms(settings.max_draft, settings.window, settings.max_new_tokens),
        form=settings.form,
        grace_s=settings.grace_s,
    )
    Intake(inbox, clock).subscribe(link, fleet=settings.fleet, edge=settings.edge)
    return Orchestrator(inbox, reception, sessions, scheduler, publisher, recorder, clock, form=settings.form)
