"""Toy edge: an edge over the toy target, as a process; all of the real edge but the model and the database."""

import argparse
import itertools
import signal
import sys
import threading
from contextlib import ExitStack
from unittest.mock import patch

from dssd.downlink import FormName
from fleet_common.logs import Event, EventStream
from fleet_common.mqtt.settings import BrokerSettings
from fleet_edge.batching.edge_draft import LENGTHS, DraftLengths
from fleet_edge.settings import EdgeSettings
from tests.support.edge_thread import NO_QUOTAS, edge_thread
from tests.support.sabotage import Sabotage, at_the_edge
from tests.support.toy_engines import ToyEngine, toy_draft, toy_verifier
from tests.support.toy_pair import Languages


def main() -> None:
    """Serve until SIGTERM; writes the event `online` on standard output when ready."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fleet", required=True)
    parser.add_argument("--form", type=FormName, default=FormName.AUTO)
    parser.add_argument("--blocks", action="store_true", help="verify drafts as blocks")
    parser.add_argument("--engine", type=ToyEngine, default=ToyEngine.SCRIPTED)
    parser.add_argument("--languages", type=Languages, default=Languages.STANDARD)
    parser.add_argument("--drafts", action="store_true", help="draft for edge-only decoding, all lengths in turn")
    parser.add_argument("--sabotage", type=Sabotage, default=Sabotage.NONE)
    arguments = parser.parse_args()
    settings = EdgeSettings(
        fleet=arguments.fleet,
        edge="edge-1",
        broker=BrokerSettings(port=arguments.port),
        form=arguments.form,
        blocks=arguments.blocks,
        quotas=NO_QUOTAS,
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with ExitStack() as stack:
        verifier = stack.enter_context(
            toy_verifier(arguments.engine, arguments.languages)
        )  # which is tried before anybody is served
        at_the_edge(arguments.sabotage, stack)
        draft = None
        if arguments.drafts:
            draft = stack.enter_context(toy_draft(arguments.languages))
            turns = itertools.cycle(LENGTHS)
            stack.enter_context(patch.object(DraftLengths, "choose", lambda *_, **__: next(turns)))
        stack.enter_context(edge_thread(settings, verifier, draft_verifier=draft))
        EventStream(sys.stdout).write(Event.ONLINE, fleet=settings.fleet, edge=settings.edge)
        stop.wait()


if __name__ == "__main__":
    main()
