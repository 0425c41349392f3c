"""Assembly of an edge from its parts, for the service, the tests and the benchmarks."""

from collections.abc import Callable
from datetime import datetime

from fleet_common.grammar.compiler import BANNED_FILE, BannedGrammars, GrammarCompiler
from fleet_common.mqtt.link import Link
from fleet_edge.answers.answers import Responder
from fleet_edge.answers.publisher import Publisher
from fleet_edge.answers.recorder import Recorder, Sink
from fleet_edge.batching.edge_draft import EdgeDrafter
from fleet_edge.batching.scheduler import Scheduler
from fleet_edge.guard import DeviceGuard, SharedQuarantines
from fleet_edge.handlers import MessageHandlers
from fleet_edge.intake import Intake, IntakeQueue
from fleet_edge.metrics import Figures
from fleet_edge.orchestrator import Orchestrator
from fleet_edge.sessions.admission import SessionOffer
from fleet_edge.sessions.grammars import SWITCHED_OFF, Grammars
from fleet_edge.sessions.table import MAX_SESSIONS, SessionTable
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import ProvidesTokenizer, Verifier


def assemble(
    settings: EdgeSettings,
    *,
    verifier: Verifier,
    draft_verifier: Verifier | None = None,
    link: Link,
    sink: Sink,
    clock: Callable[[], float],
    now: Callable[[], datetime],
    first_handle: int = 0,
) -> Orchestrator:
    """Return an orchestrator whose intake is subscribed on the link, which is not started yet.

    `first_handle` is random unless there is only one edge that never restarts.
    """
    inbox = IntakeQueue()
    sessions = SessionTable(settings.lease_s, MAX_SESSIONS, settings.max_sessions_per_device, first_handle=first_handle)
    guard = DeviceGuard(settings.quotas, settings.quarantine, clock=clock)
    scheduler = Scheduler(
        verifier,
        kv_share=guard.kv_share,
        spend_prompts=guard.spend_prompts,
        sharing=settings.prefix_sharing,
        drafter=None if draft_verifier is None else EdgeDrafter(draft_verifier),
        clock=clock,
    )
    recorder = Recorder(sink, settings.edge, now)
    figures = Figures(clock)
    answers = Responder(
        edge=settings.edge,
        target=scheduler.target,
        lease_s=settings.lease_s,
        publisher=Publisher(link, settings.fleet, figures),
        recorder=recorder,
        clock=clock,
        guard=guard,
        figures=figures,
        form=settings.form,
        padding=settings.padding,
        load=scheduler.load,
    )
    handlers = MessageHandlers(
        settings.edge,
        sessions,
        scheduler,
        answers,
        recorder,
        guard,
        SharedQuarantines(guard, settings.edge, now),
        clock,
        offer=SessionOffer(settings.max_draft, settings.window, settings.max_new_tokens),
        grammars=_grammars(settings, verifier, inbox.put),
    )
    link.screen(guard.accepts)
    Intake(inbox, clock).subscribe(link, fleet=settings.fleet, edge=settings.edge)
    return Orchestrator(inbox, handlers, sessions, scheduler, answers, clock)


def _grammars(settings: EdgeSettings, verifier: Verifier, call: Callable[[Callable[[], None]], object]) -> Grammars:
    """Prepare grammars only where the target's tokens and whole rows are known."""
    if not settings.grammars:
        return Grammars(refusal=SWITCHED_OFF)
    if verifier.info.max_top_k is not None or not isinstance(verifier, ProvidesTokenizer):
        return Grammars()
    banned = BannedGrammars(settings.spool / BANNED_FILE)
    return Grammars(
        GrammarCompiler(verifier.grammar_tokenizer, banned), call, max_per_device=settings.max_sessions_per_device
    )
