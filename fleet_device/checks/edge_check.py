"""Edge check: tests an edge through the broker as a device would, with drafts whose verdict is known.

The first generation is drafted with nonsense, so that the edge must correct nearly every token. The second is drafted
with the first, and the same edge must accept its own tokens. Neither needs a model.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_common.checks import Check, Checklist
from fleet_common.mqtt.link import Link
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings, LinkSettings
from fleet_device.client.agent import Agent
from fleet_device.client.decision import RetryPolicy
from fleet_device.client.messaging import EdgePresences, Inbox
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.errors import EdgeUnavailable, SessionFailed
from fleet_device.pacing.contract import FixedPacing
from fleet_device.requests.generate import GenerateRequest, Generation
from schemas.names import VERSION
from schemas.policy import SamplingPolicy

_PROMPT: Final = 8  # any tokens do
_TEXT: Final = 12
_DRAFTED: Final = 4
_RETRY_POLICY: Final = RetryPolicy(open_s=20.0, resume_s=20.0, verdict_s=20.0, close_s=2.0)
_CONNECT_S: Final = 5.0
_WAIT_S: Final = 5.0
# Any edge of a fleet may take a session: ask again until it is the right one.
_ATTEMPTS: Final = 16
# In another batch, or with other drafts, rounding may decide between equally likely tokens.
_MIN_ACCEPTED: Final = 0.5


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
    """One run of all checks, next to the edge's other work.

    It connects as the device `name`, which the broker must know. `tokens` are the target's token strings by id, without
    padding.
    """

    fleet: str
    edge: str
    name: str
    broker: BrokerSettings
    tokens: Sequence[str]
    on_check: Callable[[Check], None] = lambda _check: None
    make_link: Callable[[LinkSettings], Link] = PahoLink
    _edges: EdgePresences = field(default_factory=EdgePresences)
    _suggestion: _Suggestion = field(init=False)

    def __post_init__(self) -> None:
        self._suggestion = _Suggestion(len(self.tokens))

    def run(self) -> list[Check]:
        checks = Checklist(self.on_check)
        with self._agent() as agent:
            checks.run("broker", lambda: self._broker(agent.link))
            checks.run("edge", self._edge)
            checks.run("rejection", lambda: self._rejection(agent))
            checks.run("acceptance", lambda: self._acceptance(agent))
        return checks.done

    @contextmanager
    def _agent(self) -> Iterator[Agent]:
        link = self.make_link(self.broker.link(self.fleet, self.name, will=None))
        agent = Agent(
            link,
            self.fleet,
            self.name,
            ScriptedDrafter(self._suggestion, self.tokens, name="edge check"),
            FixedPacing(_DRAFTED),
            time.monotonic,
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
        return f"Connected to {self.broker.host}:{self.broker.port} as {self.name}."

    def _edge(self) -> str:
        edge = self.edge
        there = self._edges.wait_online(_WAIT_S, edge=edge)
        state = next((state for state in self._edges.known() if state.edge == edge), None)
        if state is None:
            raise EdgeUnavailable(
                f"No message came from edge {edge!r} of fleet {self.fleet!r}: start it, or correct the names."
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
        if counters.accepted < _MIN_ACCEPTED * counters.tested or not counters.accepted:
            raise SessionFailed(
                f"It accepted {counters.accepted} of {counters.tested} tokens of a draft that is its own greedy output."
            )
        return f"{counters.accepted} of {counters.tested} tokens of its own output were accepted."

    def _write(self, agent: Agent) -> Generation:
        """Run a short greedy request that the edge verifies."""
        middle = len(self.tokens) // 2
        prompt = [(middle + step) % len(self.tokens) for step in range(_PROMPT)]
        for _ in range(_ATTEMPTS):
            generation = agent.generate(
                GenerateRequest(tuple(prompt), policy=SamplingPolicy(temperature=0.0, seed=0), max_new_tokens=_TEXT)
            )
            if generation.edge == self.edge:
                return generation
        raise EdgeUnavailable(
            f"Edge {self.edge!r} took none of {_ATTEMPTS} sessions; others did. Does it refuse new ones?"
        )
