"""Computing thread: steps are computed and judged on it, one at a time, while the orchestrator's thread goes on.

Engines let other Python code run while they compute, which is most of an edge's time: what arrives meanwhile is
handled, and what the step before has decided is sent and recorded, at no cost of the target model's.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from dssd.verification import Judgement
from fleet_edge.batching.judging import Case, judge_batch
from fleet_edge.batching.planning import Batch
from fleet_edge.batching.timing import Step
from fleet_edge.verifiers.contract import Logits


@dataclass(frozen=True, slots=True)
class JudgedStep:
    """A step that has been computed.

    Attributes:
        judgements: One for each verification of its batch; None where the target's logits are not numbers.
        times: When it began and ended, its decisions included.
    """

    judgements: list[Judgement | None]
    times: Step


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that is being computed, or has been.

    Attributes:
        batch: What it computes.
    """

    batch: Batch
    _future: "Future[JudgedStep]"

    @property
    def ended(self) -> bool:
        """Whether it is over, well or not."""
        return self._future.done()

    def result(self) -> JudgedStep:
        """Return what it came to, once it has ended; raise what it failed by."""
        return self._future.result()


class ComputingThread:
    """Computes and judges steps.

    Args:
        score: Computes a batch; called on this thread, where its logits are read too before it is called again.
        clock: Monotonic seconds.
        on_end: Called on this thread when a step has ended, well or not.
    """

    def __init__(
        self, score: Callable[[Batch], Logits], clock: Callable[[], float], *, on_end: Callable[[], None]
    ) -> None:
        self._score = score
        self._clock = clock
        self._on_end = on_end
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="computing")

    def start(self, batch: Batch, cases: Sequence[Case]) -> RunningStep:
        """Begin to compute a batch.

        Args:
            batch: What is to be computed; nobody changes it from now on.
            cases: What is to be decided, one for each of its verifications.
        """
        future = self._pool.submit(self._compute, batch, cases)
        future.add_done_callback(lambda _: self._on_end())
        return RunningStep(batch, future)

    def _compute(self, batch: Batch, cases: Sequence[Case]) -> JudgedStep:
        started = self._clock()
        judgements = judge_batch(self._score(batch), cases)
        return JudgedStep(judgements, Step(started, self._clock(), len(judgements)))
