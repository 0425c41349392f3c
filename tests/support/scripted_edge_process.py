"""Scripted edge: `fleet edge run` over a scripted target, as a process; all of the real edge but the model.

It is configured as the real one is, session log and certificates included: a benchmark or a test can take either.
"""

import argparse
import atexit
import gc
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.host import use_one_heap
from fleet_common.logs import Event, EventStream
from fleet_edge import jobs
from fleet_edge.edge import Edge
from fleet_edge.session_log.alerts.settings import EVERY_S
from fleet_edge.verifiers.contract import Item
from tests.support.offset_clock import OffsetClock
from tests.support.played_steps import curve_of_environment, play
from tests.support.scripted_language import CONTEXT, LANGUAGE, LETTER_END, LETTER_WORDS, LETTERS
from tests.support.scripted_verifier import ScriptedVerifier


class _TimedVerifier(ScriptedVerifier):
    """A target whose steps take a fixed time, and a time for each token."""

    step_s = token_s = 0.0

    def score(self, items: Sequence[Item]) -> NDArray[np.float32]:
        rows = super().score(items)
        if seconds := self.step_s + self.token_s * sum(len(item.tokens) for item in items):
            time.sleep(seconds)  # of 0 it would give other threads a turn
        return rows


class _LetterVerifier(_TimedVerifier):
    def grammar_tokenizer(self) -> GrammarTokenizer:
        return GrammarTokenizer.of_words(self._words, end_tokens=LETTER_END)


def main() -> None:
    """Serve until SIGTERM; writes the events of `fleet edge run --events` on standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="TOML file with the edge's settings")
    parser.add_argument("--kv-tokens", type=int, default=1 << 20, help="tokens that are kept, ended texts' too")
    parser.add_argument("--letters", action="store_true", help="serve the language of letters")
    parser.add_argument("--step-ms", type=float, default=0.0, help="time that each step takes")
    parser.add_argument("--token-ms", type=float, default=0.0, help="time that each token adds to it")
    parser.add_argument("--alerts-s", type=float, default=EVERY_S, help="interval of evaluating the alerts")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    use_one_heap()
    atexit.register(gc.freeze)  # at its end Python would look for garbage among all objects
    size = {"context": CONTEXT, "budget_tokens": arguments.kv_tokens}
    if arguments.letters:
        verifier: _TimedVerifier = _LetterVerifier(LETTERS, LETTER_WORDS, end_tokens=LETTER_END, **size)
    else:
        verifier = _TimedVerifier(LANGUAGE, LANGUAGE.words, **size)
    verifier.step_s, verifier.token_s = arguments.step_ms / 1e3, arguments.token_ms / 1e3
    play(verifier, curve_of_environment())
    edge = Edge.from_config(arguments.config).settings
    events = EventStream(sys.stdout, outlives_reader=True)

    def tell() -> None:
        events.write(Event.ONLINE, fleet=edge.fleet, edge=edge.edge, context=CONTEXT)

    with patch.object(jobs, "EVERY_S", arguments.alerts_s), events.reporting_errors():
        Edge(edge, verifier=verifier, now=OffsetClock.from_environment()).run(on_online=tell)
    events.write(Event.STOPPED)


if __name__ == "__main__":
    main()
