"""Edge check: asks an edge as a device would, through the broker, with drafts whose verdict is known.

The first text is drafted for with nonsense, so that nearly every token is a rejection that the edge must put right. The
second is drafted for with the first, and the same edge must now accept what it said itself. Neither needs a model.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_common.mqtt.link import Link
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings, LinkSettings
from fleet_device.checks.checklist import Check, Checklist, CheckReport
from fleet_device.client.agent import Agent, Generation
from fleet_device.client.inbox import EdgePresences, Inbox
from fleet_device.client.request import GenerateRequest
from fleet_device.client.retry import RetryPolicy
from fleet_device.drafters.scripted import ScriptedDrafter
from fleet_device.errors import EdgeUnavailable, SessionFailed
from fleet_device.pacing.contract import FixedPacing
from schemas.policy import SamplingPolicy
from schemas.version import VERSION

CHECKS: Final = ("broker", "edge", "rejection", "acceptance")

_PROMPT: Final = 8  # any tokens do
_TEXT: Final = 12
_DRAFTED: Final = 4
_RETRY_POLICY: Final = RetryPolicy(open_s=20.0, resume_s=20.0, verdict_s=20.0, close_s=2.0)
_CONNECT_S: Final = 5.0
_WAIT_S: Final = 5.0
# Where a fleet has several edges, any of them may take a session: ask again until it is the one that is meant.
_ATTEMPTS: Final = 16
# The same text in another batch, or cut otherwise, may differ by rounding where two tokens are equally likely.
_LEAST_ACCEPTED: Final = 0.5


@dataclass(frozen=True, slots=True)
class Question:
    """Who asks whom.

    Attributes:
        fleet: The fleet's name.
        edge: The edge that is meant.
        name: The device as which to ask; the broker must know it.
        broker: Where the broker is, and how `name` proves who it is.
        tokens: The target's token strings by id, padding left out.
    """

    fleet: str
    edge: str
    name: str
    broker: BrokerSettings
    tokens: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeReport(CheckReport):
    """What was found of an edge.

    Attributes:
        edge: Whose.
    """

    edge: str


class _Suggestion:
    """A script that suggests a known text, or nonsense where it knows none."""

    def __init__(self, size: int) -> None:
        self.text: tuple[int, ...] = ()
        self._size = size

    def logits(self, prefix: Sequence[int]) -> NDArray[Any]:
        place = len(prefix) - _PROMPT
        token = self.text[place] if place < len(self.text) else (prefix[-1] + 1) % self._size
        row = np.zeros(self._size, dtype=np.float32)
        row[token] = 1.0
        return row


@dataclass(slots=True)
class EdgeCheck:
    """One run of all checks. The edge goes on with its work meanwhile.

    Attributes:
        question: Who asks whom.
        make_link: Makes the link to the broker.
        clock: Monotonic seconds.
        on_check: Told of every check as it ends.
    """

    question: Question
    make_link: Callable[[LinkSettings], Link] = PahoLink
    clock: Callable[[], float] = time.monotonic
    on_check: Callable[[Check], None] = lambda _check: None
    _edges: EdgePresences = field(default_factory=EdgePresences)
    _suggestion: _Suggestion = field(init=False)
    _drafter: ScriptedDrafter = field(init=False)

    def __post_init__(self) -> None:
        """Make the drafter: greedy drafting follows the script's one suggestion."""
        self._suggestion = _Suggestion(len(self.question.tokens))
        self._drafter = ScriptedDrafter(self._suggestion, self.question.tokens, name="edge check")

    def run(self) -> EdgeReport:
        """Check everything; what cannot be tried after a failure is reported as failed."""
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
                f"Nothing was heard of edge {edge!r} of fleet {self.question.fleet!r}: start it, or correct the names."
            )
        if not there:
            raise EdgeUnavailable(f"Edge {edge!r} is {state.presence.value}; start it, or wait until it has restarted.")
        if state.software != VERSION:
            raise EdgeUnavailable(
                f"Edge {edge!r} runs software {state.software} and this is {VERSION}; restart it with this one."
            )
        return f"Online with {state.target}, software {state.software}."

    def _rejection(self, agent: Agent) -> str:
        written = self._write(agent)
        self._suggestion.text = written.tokens
        counters = written.counters
        if counters.tested and counters.accepted == counters.tested:
            raise SessionFailed(f"It accepted all {counters.tested} tokens of a draft that is nonsense.")
        return (
            f"{counters.tested - counters.accepted} of {counters.tested} nonsense tokens were rejected and put right."
        )

    def _acceptance(self, agent: Agent) -> str:
        counters = self._write(agent).counters
        if counters.accepted < _LEAST_ACCEPTED * counters.tested or not counters.accepted:
            raise SessionFailed(
                f"It accepted {counters.accepted} of {counters.tested} tokens of a draft that is its own greedy text."
            )
        return f"{counters.accepted} of {counters.tested} tokens of its own text were accepted."

    def _write(self, agent: Agent) -> Generation:
        """Have a short greedy text verified by the edge that is meant."""
        middle = len(self.question.tokens) // 2
        prompt = [(middle + step) % len(self.question.tokens) for step in range(_PROMPT)]
        for _ in range(_ATTEMPTS):
            written = agent.generate(
                GenerateRequest(tuple(prompt), policy=SamplingPolicy(temperature=0.0, seed=0), max_new_tokens=_TEXT)
            )
            if written.edge == self.question.edge:
                return written
        raise EdgeUnavailable(
            f"Edge {self.question.edge!r} took none of {_ATTEMPTS} sessions; others did. Does it refuse new ones?"
        )
