"""Grammars of an edge: compiled apart from the thread that answers devices, the devices in turn.

A grammar takes milliseconds, or seconds of processor time at worst, and the first one a second more, since the
vocabulary is prepared for it. A grammar that is known is there at once.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.errors import GrammarBusy, GrammarError, GrammarKilled
from fleet_edge.errors import OpenRefused
from fleet_edge.sessions.constraint import Constraint
from schemas.messages import Open
from schemas.reasons import RefusalCode

_log = logging.getLogger(__name__)

NOT_SERVED: Final = (
    "This edge's engine serves no grammars (response_format, tools, grammar); leave them out, or use an edge with the "
    "engine llama.cpp or torch."
)
SWITCHED_OFF: Final = (
    "This edge serves no grammars (response_format, tools, grammar): its setting 'grammars' is off; leave them out."
)

_MOST: Final = 64
_MOST_OF_A_DEVICE: Final = 4
"""Opens that wait for their grammars."""

_AT_ONCE: Final = 2
"""Grammars that are compiled at the same time, never two of one device: so a small one does not wait for a large one of
another device."""

_BUSY_S: Final = 5.0

_REMEMBERED: Final = 0.9
_FORGOTTEN_S: Final = 1e-3
"""Of what a device's grammars have taken, with each that is compiled; and what counts as nothing."""


@dataclass(frozen=True, slots=True)
class PreparedGrammar:
    """What has become of a grammar.

    Attributes:
        found: The constraint of the session, or why it is refused; None if it was closed meanwhile.
        seconds: That it took, of processor time where it could be compiled.
        killed: The grammar's digest if it has ended its process.
    """

    found: Constraint | OpenRefused | None
    seconds: float = 0.0
    killed: str = ""


Prepared = Callable[[PreparedGrammar], None]
"""Called, by the way that `call` is, when a grammar is prepared."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An Open that waits for its grammar."""

    device: str
    message: Open
    then: Prepared

    @property
    def key(self) -> tuple[str, bytes]:
        return self.device, self.message.session


@dataclass(slots=True)
class Grammars:
    """Makes constraints.

    Attributes:
        compiler: None where no grammar is served.
        call: Calls a function on the thread that answers devices.
        refusal: Why none is served.
        clock: Monotonic seconds.
    """

    compiler: GrammarCompiler | None = None
    call: Callable[[Callable[[], None]], object] = lambda function: function()
    refusal: str = NOT_SERVED
    clock: Callable[[], float] = time.monotonic
    _attempts: dict[tuple[str, bytes], int] = field(default_factory=dict)  # by session, of those that wait
    _queues: dict[str, deque[_Waiting]] = field(default_factory=dict)  # by device
    _compiling: set[str] = field(default_factory=set)  # devices
    _taken_s: dict[str, float] = field(default_factory=dict)  # by device, of late
    _lock: threading.Lock = field(default_factory=threading.Lock)  # of the three above
    _pool: ThreadPoolExecutor | None = None

    def waits(self, device: str, message: Open) -> bool:
        """Whether an Open is a repetition of one whose grammar is being prepared."""
        return self._attempts.get((device, message.session)) == message.attempt

    def forget(self, device: str, session: bytes) -> None:
        """Tell nobody of the grammar of a session that is closed before it was granted."""
        self._attempts.pop((device, session), None)

    def at_once(self, message: Open) -> Constraint | None:
        """Return the constraint of an Open if that takes no time; else None, and it is to be prepared.

        Raises:
            OpenRefused: Its grammar cannot be used.
        """
        compiler, grammar = self._compiler(), message.policy.grammar
        assert grammar is not None
        if message.resume or not compiler.knows(grammar):
            return None
        try:
            return Constraint.begin(compiler.compiled(grammar))
        except GrammarError as error:
            raise OpenRefused(RefusalCode.GRAMMAR, str(error)) from None

    def prepare(self, device: str, message: Open, then: Prepared) -> None:
        """Have the constraint of an Open made, and `then` called with it.

        Raises:
            OpenRefused: Too many wait already.
        """
        self._compiler()
        waiting = _Waiting(device, message, then)
        of_device = sum(owner == device for owner, _ in self._attempts)
        if len(self._attempts) >= _MOST or of_device >= _MOST_OF_A_DEVICE:
            raise OpenRefused(
                RefusalCode.BUSY, "The edge has as many grammars to prepare as it can; try again shortly."
            )
        self._attempts[waiting.key] = message.attempt
        with self._lock:
            self._queues.setdefault(device, deque()).append(waiting)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="grammars")
        self._pool.submit(self._work)

    def close(self) -> None:
        """Begin no other; what is being compiled ends by itself."""
        with self._lock:
            self._queues.clear()
        if self.compiler is not None:
            self.compiler.close()

    def _work(self) -> None:
        """Prepare what is next, and what waits behind it: another thread may have found nothing that it could take."""
        while (waiting := self._next()) is not None:
            prepared = self._prepare(waiting.message)
            with self._lock:
                self._compiling.discard(waiting.device)
                self._count(waiting.device, prepared.seconds)
            self.call(partial(self._tell, waiting, prepared))

    def _next(self) -> _Waiting | None:
        """Return the oldest Open of the device whose grammars have taken least; None if nothing can be begun."""
        with self._lock:
            able = [device for device in self._queues if device not in self._compiling]
            if not able:
                return None
            device = min(able, key=lambda device: self._taken_s.get(device, 0.0))
            waiting = self._queues[device].popleft()
            if not self._queues[device]:
                del self._queues[device]
            self._compiling.add(device)
            return waiting

    def _count(self, device: str, seconds: float) -> None:
        """Count what a device's grammar has taken; a device that is forgotten has taken nothing."""
        taken = {name: _REMEMBERED * each for name, each in self._taken_s.items() if each > _FORGOTTEN_S}
        taken[device] = taken.get(device, 0.0) + seconds + _FORGOTTEN_S
        self._taken_s = taken

    def _prepare(self, message: Open) -> PreparedGrammar:
        compiler, grammar = self._compiler(), message.policy.grammar
        assert grammar is not None
        known, began, killed = compiler.knows(grammar), self.clock(), ""
        try:
            compiled = compiler.compiled(grammar)
            found: Constraint | OpenRefused = Constraint.begin(compiled, message.resume or ())
            return PreparedGrammar(found, 0.0 if known else compiled.compile_s)
        except GrammarBusy as error:
            found = OpenRefused(RefusalCode.BUSY, str(error), retry_s=_BUSY_S)
        except GrammarError as error:
            found = OpenRefused(RefusalCode.GRAMMAR, str(error))
            killed = error.digest if isinstance(error, GrammarKilled) else ""
        except Exception:  # noqa: BLE001 - the device is not to wait for ever
            _log.exception("A grammar could not be prepared.")
            found = OpenRefused(RefusalCode.GRAMMAR, "The edge could not prepare the grammar; its log says more.")
        return PreparedGrammar(found, 0.0 if known else self.clock() - began, killed)

    def _tell(self, waiting: _Waiting, prepared: PreparedGrammar) -> None:
        if self._attempts.get(waiting.key) == waiting.message.attempt:
            del self._attempts[waiting.key]
        else:
            prepared = replace(prepared, found=None)
        waiting.then(prepared)

    def _compiler(self) -> GrammarCompiler:
        if self.compiler is None:
            raise OpenRefused(RefusalCode.GRAMMAR, self.refusal)
        return self.compiler
