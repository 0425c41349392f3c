"""Grammar processes that tests end, from outside or by a request."""

import signal
from array import array
from collections.abc import Sequence
from contextlib import suppress

import psutil
import pytest

from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.messages import GrammarRequest
from fleet_common.grammar.workers import _Link
from tests.support.waiting import PATIENCE_S


def forking_process(compiler: GrammarCompiler) -> psutil.Process:
    parent = compiler._workers._parent
    assert parent is not None
    return psutil.Process(parent.pid)


def grammar_processes(compiler: GrammarCompiler) -> list[psutil.Process]:
    """Return the processes that run a compiler's grammars."""
    found: list[psutil.Process] = forking_process(compiler).children()
    return found


def end_processes(processes: Sequence[psutil.Process], number: int = signal.SIGKILL) -> None:
    for each in processes:
        each.send_signal(number)
    psutil.wait_procs(processes, timeout=PATIENCE_S)


def end_at(
    monkeypatch: pytest.MonkeyPatch, text: Sequence[int], number: int = signal.SIGSEGV, *, times: int = 1_000_000
) -> list[int]:
    """Make a request crash each process, at most so many, as soon as its text begins with `text`; return their ids."""
    ended: list[int] = []
    ask, start = _Link.ask, array("I", text).tobytes()

    def crashed(link: _Link, message: bytes, limit_s: float) -> bytes:
        request, _ = GrammarRequest.decode(message)
        if request.tokens.startswith(start) and len(ended) < times:
            ended.append(link.pid)
            with suppress(psutil.NoSuchProcess):
                end_processes([psutil.Process(link.pid)], number)
        return ask(link, message, limit_s)

    monkeypatch.setattr(_Link, "ask", crashed)
    return ended
