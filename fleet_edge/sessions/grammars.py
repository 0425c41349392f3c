"""Grammars: compile the grammars of Opens off the main thread, and apply them to sessions.

Compiling takes milliseconds, or seconds of CPU time at worst, and a second more for the first grammar of a vocabulary.
Known grammars are available at once. Devices take turns.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.errors import GrammarBusy, GrammarError, GrammarKilled, GrammarNotReady
from fleet_common.grammar.matcher import GrammarMatcher
from fleet_edge.errors import OpenRefused
from sampling.distribution import Dist, point_mass, shape
from sampling.verification import Judgement
from schemas.fields import SESSIONS_PER_DEVICE
from schemas.messages import Open
from schemas.policy import SamplingPolicy
from schemas.reasons import RefusalCode

MAX_FORCED: Final = 16
"""Most forced tokens computed in one step of edge-only decoding."""

_RULED_OUT = "The target model rules out every token that the grammar allows; loosen the grammar, or the prompt."


@dataclass(slots=True)
class Constraint:
    """A session's grammar. Used on the computing thread; the main thread reads `failure`, `killed` and `ready`.

    `failure` says why the generation cannot go on, `killed` what has ended if it has ended a process that tried it
    alone. While it is not `ready`, the worker does not follow it, and it must not be used until `restore` is called.
    """

    matcher: GrammarMatcher
    clock: Callable[[], float] = time.monotonic
    failure: str = ""
    killed: str = ""
    ready: bool = True
    _forced: list[bool] = field(default_factory=list)  # by row of the current case
    _ahead: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # an output, and what must follow
    _spent_s: float = 0.0

    @classmethod
    def begin(cls, matcher: GrammarMatcher) -> "Constraint":
        """Return the constraint of a new session; never waits."""
        constraint = cls(matcher)
        constraint.look_ahead(())
        return constraint

    @classmethod
    def resume(cls, matcher: GrammarMatcher, text: Sequence[int]) -> "Constraint":
        """Return the constraint of a session that has `text` already, once the worker follows it; may take seconds.

        Raises `GrammarError` if the grammar excludes it, or cannot be followed.
        """
        matcher.restore(text)
        matcher.check(text)
        constraint = cls(matcher)
        constraint.look_ahead(text, patient=True)
        constraint._spent_s = 0.0
        return constraint

    def restore(self, text: Sequence[int]) -> None:
        """Restore the session's output in the worker; may take seconds. An error appears at the next step."""
        with suppress(GrammarError):
            self.matcher.restore(text)
        self.look_ahead(text, patient=True)
        self._spent_s = 0.0
        self.ready = True

    def shape(self, row: NDArray[np.float32], policy: SamplingPolicy, *, text: Sequence[int]) -> Dist:
        """Return the target distribution after an output, masked by the grammar and renormalised.

        `row` has the target's float32 logits `[vocabulary]`; `text` leaves out the prompt. Raises ValueError if there
        is none; `failure` says why unless the logits are invalid.
        """
        began = self.clock()
        try:
            allowed = self.matcher.allowed(text, patient=False)
        except GrammarError as error:
            self._forced.clear()
            self.ready = not isinstance(error, GrammarNotReady)
            self.failure = str(error)
            if isinstance(error, GrammarKilled):
                self.killed = error.report
            raise ValueError(self.failure) from error
        finally:
            self._spent_s += self.clock() - began
        self._forced.append(len(allowed) == 1)
        if len(allowed) == 1:
            return point_mass(int(allowed[0]))
        if np.all(row[allowed] == -np.inf):
            self.failure = _RULED_OUT
            raise ValueError(self.failure)
        return shape(row, policy, allowed=allowed)

    def count(self, judgement: Judgement) -> Judgement:
        """Add the forced tokens to a judgement on rows that were just shaped."""
        forced, self._forced = self._forced, []
        decided = forced[: judgement.accepted + (judgement.token is not None)]
        return replace(judgement, forced=tuple(place for place, each in enumerate(decided) if each))

    def look_ahead(self, text: Sequence[int], *, patient: bool = False) -> None:
        """Compute what must follow an output, for `next_forced`; a `patient` caller may wait for seconds."""
        began = self.clock()
        try:
            self._ahead = tuple(text), self.matcher.forced(text, patient=patient)
        except GrammarError as error:
            self._ahead = (), ()  # reported when the output is judged
            self.ready = not isinstance(error, GrammarNotReady)
        self._spent_s += self.clock() - began

    def next_forced(self, text: Sequence[int], most: int) -> tuple[int, ...]:
        """Return at most `most` tokens that must follow an output; none unless `look_ahead` was last called with it."""
        known, forced = self._ahead
        return forced[: max(0, most)] if known == tuple(text) else ()

    def take_spent_s(self) -> float:
        """Return the seconds spent waiting for the grammar since the last call."""
        spent, self._spent_s = self._spent_s, 0.0
        return spent


_log = logging.getLogger(__name__)

NOT_SERVED: Final = (
    "This edge's engine serves no grammars (response_format, tools, grammar); leave them out, or use an edge with the "
    "engine llama.cpp or torch."
)
SWITCHED_OFF: Final = (
    "This edge serves no grammars (response_format, tools, grammar): its setting 'grammars' is off; leave them out."
)

_MOST: Final = 64
"""Opens that may wait for their grammars."""

_AT_ONCE: Final = 4
"""Grammars prepared at the same time, of different devices, so that a small one need not wait for a large one."""

_REMEMBERED: Final = 0.9
_FORGOTTEN_S: Final = 1e-3
"""Decay of a device's compile time with each grammar compiled, and what counts as zero."""


@dataclass(frozen=True, slots=True)
class PreparedGrammar:
    """Result of preparing a grammar: a constraint, a refusal, or None if the session was closed meanwhile.

    `seconds` is CPU time to compile it, or elapsed time on failure; `killed` says what has ended if the grammar has
    killed its process.
    """

    found: Constraint | OpenRefused | None
    seconds: float = 0.0
    killed: str = ""


Prepared = Callable[[PreparedGrammar], None]


@dataclass(frozen=True, slots=True)
class _Task:
    """Work for a device; `run` returns the seconds to count."""

    device: str
    run: Callable[[], float]


@dataclass(slots=True)
class Grammars:
    """Prepares constraints for Opens, at most `max_per_device` of a device at a time.

    `call` calls a function on the main thread.
    """

    compiler: GrammarCompiler | None = None
    call: Callable[[Callable[[], None]], object] = lambda function: function()
    refusal: str = NOT_SERVED
    max_per_device: int = SESSIONS_PER_DEVICE
    clock: Callable[[], float] = time.monotonic
    _attempts: dict[tuple[str, bytes], int] = field(default_factory=dict)  # waiting, by session
    _queues: dict[str, deque[_Task]] = field(default_factory=dict)  # by device
    _compiling: set[str] = field(default_factory=set)  # devices
    _taken_s: dict[str, float] = field(default_factory=dict)  # recent, by device
    _lock: threading.Lock = field(default_factory=threading.Lock)  # guards the three above
    _pool: ThreadPoolExecutor | None = None

    def waits(self, device: str, message: Open) -> bool:
        """The Open repeats one whose grammar is being prepared."""
        return self._attempts.get((device, message.session)) == message.attempt

    def forget(self, device: str, session: bytes) -> None:
        """Drop the Open of a session that was closed before it was granted."""
        self._attempts.pop((device, session), None)

    def at_once(self, device: str, message: Open) -> Constraint | None:
        """Return the constraint of an Open if it needs no compilation, otherwise None; raises `OpenRefused`."""
        compiler, grammar = self._compiler(), message.policy.grammar
        assert grammar is not None
        if message.resume:
            return None
        try:
            known = compiler.known(grammar)
            return None if known is None else Constraint.begin(GrammarMatcher(known, device))
        except GrammarBusy as error:
            raise OpenRefused(RefusalCode.BUSY, str(error)) from None
        except GrammarError as error:
            raise OpenRefused(RefusalCode.GRAMMAR, str(error)) from None

    def prepare(self, device: str, message: Open, then: Prepared) -> None:
        """Prepare the constraint of an Open, then call `then`; raises `OpenRefused` if too many Opens are waiting."""
        self._compiler()
        of_device = sum(owner == device for owner, _ in self._attempts)
        if len(self._attempts) >= _MOST or of_device >= self.max_per_device:
            raise OpenRefused(RefusalCode.BUSY, "The edge has too many grammars to prepare; try again shortly.")
        self._attempts[device, message.session] = message.attempt

        def run() -> float:
            prepared = self._prepare(device, message)
            self.call(partial(self._deliver, device, message, then, prepared))
            return prepared.seconds

        self._submit(_Task(device, run))

    def restore(self, device: str, constraint: Constraint, text: Sequence[int]) -> None:
        """Restore a running session's output in the worker."""

        def run() -> float:
            began = self.clock()
            constraint.restore(text)
            self.call(lambda: None)  # wakes the main thread
            return self.clock() - began

        self._submit(_Task(device, run))

    def close(self) -> None:
        with self._lock:
            self._queues.clear()
        if self.compiler is not None:
            self.compiler.close()

    def _submit(self, task: _Task) -> None:
        with self._lock:
            self._queues.setdefault(task.device, deque()).append(task)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="grammars")
        self._pool.submit(self._work)

    def _work(self) -> None:
        while (task := self._next()) is not None:
            seconds = 0.0
            try:
                seconds = task.run()
            except Exception:  # noqa: BLE001 - logged with its traceback
                _log.exception("A grammar could not be prepared or restored.")
            with self._lock:
                self._compiling.discard(task.device)
                self._count(task.device, seconds)

    def _next(self) -> _Task | None:
        """Return the oldest task of the idle device with the least compile time; None if there is none."""
        with self._lock:
            able = [device for device in self._queues if device not in self._compiling]
            if not able:
                return None
            device = min(able, key=lambda device: self._taken_s.get(device, 0.0))
            task = self._queues[device].popleft()
            if not self._queues[device]:
                del self._queues[device]
            self._compiling.add(device)
            return task

    def _count(self, device: str, seconds: float) -> None:
        taken = {name: _REMEMBERED * each for name, each in self._taken_s.items() if each > _FORGOTTEN_S}
        taken[device] = taken.get(device, 0.0) + seconds + _FORGOTTEN_S
        self._taken_s = taken

    def _prepare(self, device: str, message: Open) -> PreparedGrammar:
        compiler, grammar = self._compiler(), message.policy.grammar
        assert grammar is not None
        known, began, killed = None, self.clock(), ""
        try:
            known = compiler.known(grammar)
            matcher = GrammarMatcher(known or compiler.compiled(grammar), device)
            found: Constraint | OpenRefused = Constraint.resume(matcher, message.resume or ())
            return PreparedGrammar(found, 0.0 if known else matcher.compile_s)
        except (GrammarBusy, GrammarNotReady) as error:
            found = OpenRefused(RefusalCode.BUSY, str(error))
        except GrammarError as error:
            found = OpenRefused(RefusalCode.GRAMMAR, str(error))
            killed = error.report if isinstance(error, GrammarKilled) else ""
        except Exception:  # noqa: BLE001 - the device is not to wait for ever
            _log.exception("A grammar could not be prepared.")
            found = OpenRefused(RefusalCode.GRAMMAR, "The edge could not prepare the grammar; its log says more.")
        return PreparedGrammar(found, 0.0 if known else self.clock() - began, killed)

    def _deliver(self, device: str, message: Open, then: Prepared, prepared: PreparedGrammar) -> None:
        if self._attempts.get((device, message.session)) == message.attempt:
            del self._attempts[device, message.session]
        else:
            prepared = replace(prepared, found=None)
        then(prepared)

    def _compiler(self) -> GrammarCompiler:
        if self.compiler is None:
            raise OpenRefused(RefusalCode.GRAMMAR, self.refusal)
        return self.compiler
