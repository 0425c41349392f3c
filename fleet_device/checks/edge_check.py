"""Edge check: tests an edge through the broker as a device would, with drafts whose verdict is known.

The first generation is drafted with nonsense, so that the edge must correct nearly every token. The second is drafted
with the first, and the same edge must accept its own tokens. Neither needs a model.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from fleet_common.mqtt.link import Link
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings, LinkSettings
from fleet_device.client.agent import Agent
from fleet_device.client.messaging import EdgePresences, Inbox
from fleet_device.client.retry import RetryPolicy
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.errors import EdgeUnavailable, SessionFailed
from fleet_device.pacing.contract import FixedPacing
from fleet_device.requests.generate import GenerateRequest, Generation
from schemas.errors import FleetError
from schemas.names import VERSION
from schemas.policy import SamplingPolicy


class NotApplicable(FleetError):  # noqa: N818 - reads as what it says
    """There is nothing to check; the message says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check; `ok` also if there is nothing to check, `ms` 0 if it was skipped.

    `sentence` says what was found, what to do, or why the check was skipped.
    """

    name: str
    ok: bool
    ms: float
    sentence: str
    skipped: bool = False

    @property
    def status(self) -> Literal["ok", "failed", "skipped"]:
        return "skipped" if self.skipped else "ok" if self.ok else "failed"

    def json(self) -> dict[str, Any]:
        found = {name: value for name, value in asdict(self).items() if name != "skipped"}
        return {**found, "ms": round(self.ms, 1), "status": self.status}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def json(self) -> dict[str, Any]:
        about = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "checks"}
        return {"ok": self.ok, "software": VERSION, **about, "checks": [check.json() for check in self.checks]}


@dataclass(slots=True)
class Checklist:
    """One run of the named checks, in order; `on_check` receives each as it ends."""

    names: tuple[str, ...]
    on_check: Callable[[Check], None] = lambda _check: None
    clock: Callable[[], float] = time.monotonic
    _done: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self._done)

    def check(self, probe: Callable[[], str], *, needs: Collection[str] | None = None) -> None:
        """Run the next check, unless one of those that it `needs` has failed; None needs all earlier ones.

        `probe` returns what it found, or raises what is wrong, or `NotApplicable`.
        """
        if self._failed(needs) is not None:
            self._skip(needs)
            return
        started = self.clock()
        ok, skipped = True, False
        try:
            sentence = probe()
        except NotApplicable as error:
            sentence, skipped = str(error), True
        except FleetError as error:
            sentence, ok = str(error), False
        self._tell(ok=ok, ms=(self.clock() - started) * 1e3, sentence=sentence, skipped=skipped)

    def finish(self) -> tuple[Check, ...]:
        while len(self._done) < len(self.names):
            self._skip()
        return tuple(self._done)

    def _failed(self, needs: Collection[str] | None) -> str | None:
        wanted = (check for check in self._done if needs is None or check.name in needs)
        return next((check.name for check in wanted if not check.ok), None)

    def _skip(self, needs: Collection[str] | None = None) -> None:
        self._tell(ok=False, ms=0.0, sentence=f"Skipped, because {self._failed(needs)} failed.", skipped=True)

    def _tell(self, *, ok: bool, ms: float, sentence: str, skipped: bool = False) -> None:
        check = Check(self.names[len(self._done)], ok, ms, sentence, skipped)
        self._done.append(check)
        self.on_check(check)


CHECKS: Final = ("broker", "edge", "rejection", "acceptance")

_PROMPT: Final = 8  # any tokens do
_TEXT: Final = 12
_DRAFTED: Final = 4
_RETRY_POLICY: Final = RetryPolicy(open_s=20.0, resume_s=20.0, verdict_s=20.0, close_s=2.0)
_CONNECT_S: Final = 5.0
_WAIT_S: Final = 5.0
# Any edge of a fleet may take a session: ask again until it is the right one.
_ATTEMPTS: Final = 16
# In another batch, or with other drafts, rounding may decide between equally likely tokens.
_LEAST_ACCEPTED: Final = 0.5


@dataclass(frozen=True, slots=True)
class CheckedEdge:
    """The edge to check, and the device `name` to connect as, which the broker must know.

    `tokens` are the target's token strings by id, without padding.
    """

    fleet: str
    edge: str
    name: str
    broker: BrokerSettings
    tokens: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeReport(CheckReport):
    edge: str


@dataclass(slots=True)
class _Suggestion:
    """A script that suggests known tokens, or nonsense where it has none."""

    size: int
    text: tuple[int, ...] = ()

    def logits(self, prefix: Sequence[int]) -> NDArray[Any]:
        place = len(prefix) - _PROMPT
        token = self.text[place] if place < len(self.text) else (prefix[-1] + 1) % self.size
        row = np.zeros(self.size, dtype=np.float32)
        row[token] = 1.0
        return row


@dataclass(slots=True)
class EdgeCheck:
    """One run of all checks, next to the edge's other work; `on_check` receives each as it ends."""

    question: CheckedEdge
    make_link: Callable[[LinkSettings], Link] = PahoLink
    clock: Callable[[], float] = time.monotonic
    on_check: Callable[[Check], None] = lambda _check: None
    _edges: EdgePresences = field(default_factory=EdgePresences)
    _suggestion: _Suggestion = field(init=False)
    _drafter: ScriptedDrafter = field(init=False)

    def __post_init__(self) -> None:
        self._suggestion = _Suggestion(len(self.question.tokens))
        self._drafter = ScriptedDrafter(self._suggestion, self.question.tokens, name="edge check")

    def run(self) -> EdgeReport:
        checks = Checklist(CHECKS, self.on_check, self.clock)
        with self._agent() as agent:
            checks.check(lambda: self._broker(agent.link))
            checks.check(self._edge)
            checks.check(lambda: self._rejection(agent))
            checks.check(lambda: self._acceptance(agent))
        return EdgeReport(edge=self.question.edge, checks=checks.finish())

    @contextmanager
    def _agent(self) -> Iterator[Agent]:
        asked = self.question
        link = self.make_link(asked.broker.link(asked.fleet, asked.name, will=None))
        agent = Agent(
            link,
            asked.fleet,
            asked.name,
            self._drafter,
            FixedPacing(_DRAFTED),
            self.clock,
            _RETRY_POLICY,
            Inbox(self._edges),
        )
        agent.attach()
        try:
            yield agent
        finally:
            link.stop()

    def _broker(self, link: Link) -> str:
        link.start(timeout_s=_CONNECT_S)
        broker = self.question.broker
        return f"Connected to {broker.host}:{broker.port} as {self.question.name}."

    def _edge(self) -> str:
        edge = self.question.edge
        there = self._edges.wait_online(_WAIT_S, edge=edge)
        state = next((state for state in self._edges.known() if state.edge == edge), None)
        if state is None:
            raise EdgeUnavailable(
                f"No message came from edge {edge!r} of fleet {self.question.fleet!r}: start it, or correct the names."
            )
        if not there:
            raise EdgeUnavailable(f"Edge {edge!r} is {state.presence.value}; start it, or wait until it has restarted.")
        if state.software != VERSION:
            raise EdgeUnavailable(
                f"Edge {edge!r} runs software {state.software} and this is {VERSION}; restart it with this one."
            )
        return f"Online with {state.target}, software {state.software}."

    def _rejection(self, agent: Agent) -> str:
        generation = self._write(agent)
        self._suggestion.text = generation.tokens
        counters = generation.counters
        if counters.tested and counters.accepted == counters.tested:
            raise SessionFailed(f"It accepted all {counters.tested} tokens of a draft that is nonsense.")
        return (
            f"{counters.tested - counters.accepted} of {counters.tested} nonsense tokens were rejected and corrected."
        )

    def _acceptance(self, agent: Agent) -> str:
        counters = self._write(agent).counters
        if counters.accepted < _LEAST_ACCEPTED * counters.tested or not counters.accepted:
            raise SessionFailed(
                f"It accepted {counters.accepted} of {counters.tested} tokens of a draft that is its own greedy text."
            )
        return f"{counters.accepted} of {counters.tested} tokens of its own output were accepted."

    def _write(self, agent: Agent) -> Generation:
        """Generate a short greedy text that the edge verifies."""
        middle = len(self.question.tokens) // 2
        prompt = [(middle + step) % len(self.question.tokens) for step in range(_PROMPT)]
        for _ in range(_ATTEMPTS):
            generation = agent.generate(
                GenerateRequest(tuple(prompt), policy=SamplingPolicy(temperature=0.0, seed=0), max_new_tokens=_TEXT)
            )
            if generation.edge == self.question.edge:
                return generation
        raise EdgeUnavailable(
            f"Edge {self.question.edge!r} took none of {_ATTEMPTS} sessions; others did. Does it refuse new ones?"
        )
