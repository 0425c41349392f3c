"""Toy edge: an edge over the toy target, as a process; all of the real edge but the model and the database."""

import argparse
import atexit
import gc
import itertools
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Final
from unittest.mock import patch

from fleet_common.logs import Event, EventStream
from fleet_common.mqtt.link import Link
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings
from fleet_edge.batching.edge_draft import LENGTHS, DraftLengths
from fleet_edge.errors import OpenRefused
from fleet_edge.handlers import MessageHandlers
from fleet_edge.intake import ReceivedMessage
from fleet_edge.sessions.admission import SessionLimits
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import TargetInfo
from sampling.downlink import FormName
from schemas.control import EdgeState, Presence, encode_json
from schemas.messages import Draft, Open
from schemas.names import VERSION
from schemas.reasons import EndReason, RefusalCode
from schemas.topics import Topic, build
from tests.support.edge_thread import NO_QUOTAS, edge_thread
from tests.support.sabotage import Sabotage, at_the_edge
from tests.support.toy_engines import ToyEngine, toy_draft, toy_verifier
from tests.support.toy_pair import Languages

_LOST: Final = 0.3
"""Share of drafts after the first token at which a forgetful edge loses the session."""


@contextmanager
def _announced(link: Link, settings: EdgeSettings, target: TargetInfo) -> Iterator[None]:
    topic = build(Topic.EDGE_STATE, fleet=settings.fleet, edge=settings.edge)

    def publish(presence: Presence) -> None:
        state = EdgeState(
            presence=presence,
            software=VERSION,
            edge=settings.edge,
            target=target.name,
            target_id=target.target_id.hex(),
            vocabulary=str(target.vocabulary),
            since=datetime.now(UTC),
        )
        link.publish(topic, encode_json(state), retain=True)

    publish(Presence.ONLINE)
    yield
    publish(Presence.OFFLINE)


def _draft_or_forget(self: MessageHandlers, device: str, draft: Draft, arrival: ReceivedMessage) -> None:
    session = next((each for each in self.sessions if (each.device, each.handle) == (device, draft.handle)), None)
    if session is not None and draft.base and _chance.random() < _LOST:
        self.answers.confirm_end(session, EndReason.LOST)
        self._forget(session)
        return
    _draft(self, device, draft, arrival)


def _limits_of_resumes(self: MessageHandlers, device: str, message: Open) -> SessionLimits:
    if not message.resume:
        raise OpenRefused(RefusalCode.BUSY, "This edge begins no output.", retry_s=0.0)
    return _limits(self, device, message)


_chance: Final = random.Random(5)
_draft, _limits = MessageHandlers._on_draft, MessageHandlers._limits


def main() -> None:
    """Serve until SIGTERM; writes the event `online` on standard output when ready."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fleet", required=True)
    parser.add_argument("--form", type=FormName, default=FormName.AUTO)
    parser.add_argument("--engine", type=ToyEngine, default=ToyEngine.SCRIPTED)
    parser.add_argument("--languages", type=Languages, default=Languages.STANDARD)
    parser.add_argument("--drafts", action="store_true", help="draft for edge-only decoding, all lengths in turn")
    parser.add_argument("--edge", default="edge-1")
    parser.add_argument("--forgetful", action="store_true", help="lose sessions in the middle of their output")
    parser.add_argument("--foreign", action="store_true", help="have another target; begin no output, only continue")
    parser.add_argument("--sabotage", type=Sabotage, default=Sabotage.NONE)
    arguments = parser.parse_args()
    atexit.register(gc.freeze)  # at its end Python would look for garbage among all objects
    settings = EdgeSettings(
        fleet=arguments.fleet,
        edge=arguments.edge,
        broker=BrokerSettings(port=arguments.port),
        form=arguments.form,
        quotas=NO_QUOTAS,
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with ExitStack() as stack:
        # It is tried before anybody is served.
        verifier = stack.enter_context(toy_verifier(arguments.engine, arguments.languages, foreign=arguments.foreign))
        at_the_edge(arguments.sabotage, stack)
        draft = None
        if arguments.drafts:
            draft = stack.enter_context(toy_draft(arguments.languages))
            turns = itertools.cycle(LENGTHS)
            stack.enter_context(patch.object(DraftLengths, "choose", lambda *_, **__: next(turns)))
        if arguments.forgetful:
            stack.enter_context(patch.object(MessageHandlers, "_on_draft", _draft_or_forget))
        if arguments.foreign:
            stack.enter_context(patch.object(MessageHandlers, "_limits", _limits_of_resumes))
        link = PahoLink(settings.broker.link(settings.fleet, settings.edge, will=None))
        stack.enter_context(edge_thread(settings, verifier, link=link, draft_verifier=draft))
        stack.enter_context(_announced(link, settings, verifier.info))
        EventStream(sys.stdout).write(Event.ONLINE, fleet=settings.fleet, edge=settings.edge)
        stop.wait()


if __name__ == "__main__":
    main()
