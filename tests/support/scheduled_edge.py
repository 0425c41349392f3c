"""Scheduler over a scripted verifier, which publishes nothing."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from fleet_edge.batching.batch_builder import Budget
from fleet_edge.batching.scheduler import Scheduler
from fleet_edge.batching.step_cost import StepCost
from fleet_edge.batching.steps import Batch, StepReport, StepTimes
from fleet_edge.sessions.admission import SessionLimits
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.settings import PrefixSharing
from fleet_edge.verifiers.contract import Verifier
from sampling.verification import Judgement
from tests.support.drafts import LIMITS, arrived, draft, edge_session
from tests.support.markov import MarkovScript
from tests.support.scripted_verifier import ScriptedVerifier

SCRIPT = MarkovScript(size=10, seed=1)


class Edge:
    def __init__(
        self,
        budget: Budget | None = None,
        *,
        kv_tokens: int = 1 << 20,
        verifier: Verifier | None = None,
        sharing: PrefixSharing = PrefixSharing.OFF,
        token_s: float = 1e-6,
        kv_share: Callable[[str], float] = lambda _device: 1.0,
    ) -> None:
        self.prompt_s = Counter[str]()  # computed, by device
        self.verifier = verifier or ScriptedVerifier(SCRIPT, SCRIPT.words, budget_tokens=kv_tokens)
        cost = StepCost(self.verifier.info.min_step_tokens)
        if token_s:
            cost.add_prompts(token_s, tokens=1)
        self.scheduler = Scheduler(
            self.verifier,
            budget or Budget(),
            sharing=sharing,
            cost=cost,
            kv_share=kv_share,
            spend_prompts=lambda device, seconds: self.prompt_s.update({device: seconds}),
        )
        self.sessions: list[EdgeSession] = []
        self.now = 0.0
        self._opened = 0

    def session(
        self, *, device: str | None = None, prompt: int | Sequence[int] = 3, limits: SessionLimits = LIMITS
    ) -> EdgeSession:
        number = self._opened
        self._opened += 1
        tokens = (1,) * prompt if isinstance(prompt, int) else tuple(prompt)
        session = edge_session(handle=number, device=device or f"device-{number}", prompt=tokens, limits=limits)
        self.scheduler.on_open(session)
        self.sessions.append(session)
        return session

    def drafting(
        self, *, at: float = 0.0, device: str | None = None, prompt: int | Sequence[int] = 3, tokens: int = 2
    ) -> EdgeSession:
        session = self.session(device=device, prompt=prompt)
        session.admit(arrived(draft((4,) * tokens, handle=session.handle), at=at))
        return session

    def again(self, session: EdgeSession, *, at: float, round_: int) -> None:
        text = session.tokens[session.prompt_length :]
        session.admit(arrived(draft((4,), text=text, handle=session.handle, round_=round_), at=at))

    def next_batch(self, sessions: Iterable[EdgeSession] | None = None) -> Batch:
        return self.scheduler.next_batch(self.sessions if sessions is None else list(sessions), now=self.now)

    def run(self) -> list[Batch]:
        """Compute everything, a step of a millisecond each second; return the steps."""
        steps = []
        while batch := self.next_batch():
            self.compute(batch)
            times = StepTimes(self.now, self.now + 1e-3, sessions=len(batch.verifications))
            self.scheduler.on_step(StepReport(batch, times))
            self.now += 1.0
            steps.append(batch)
        return steps

    def compute(self, batch: Batch) -> list[EdgeSession]:
        """Compute a step, reject the first token of every draft, and return the sessions with a verdict."""
        self.scheduler.score(batch)
        for work in batch.verifications:
            drafted = sum(len(each.draft.tokens) for each in work.chain)
            work.session.settle(work.chain, Judgement(drafted, rejected=False, token=5))
        return [work.session for work in batch.verifications]


def computed(batch: Batch) -> dict[int, int]:
    return {item.sequence: len(item.tokens) for item in batch.items}
