"""Experiment: one kind of fault at many moments of a fleet that writes all the time."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.faults.agreement import disagreements
from benchmarks.faults.fleet import DisturbedFleet, Load
from benchmarks.faults.kinds import Fault
from benchmarks.processes import BenchError

_FIRST_S: Final = 60.0  # until all devices write
_PATIENCE_S: Final = 60.0  # until all go on after a fault
_BETWEEN_S: Final = (0.3, 2.0)


@dataclass(slots=True)
class Result:
    """What has become of the texts.

    Attributes:
        name: The fault's.
        how: How it was made, where that depends on the machine.
        moments: At how many it struck.
        seconds: From the first to the last.
        texts: Ended, by mode.
        tokens: Committed.
        resumes: How often sessions were opened again.
        wrong: Texts that came out otherwise than they must: by what is wrong, how many.
        broken_off: Sentences of texts that failed after tokens had been committed: these tokens are lost.
        refused: Sentences of texts that failed before: the application knows, and may ask again.
        disagreements: Sentences on sessions of which log and device do not say the same.
        stuck: Devices that had not gone on a minute after a fault, summed over the moments.
        recovery_s: From the end of each fault to each device's next token.
    """

    name: str
    how: str = ""
    moments: int = 0
    seconds: float = 0.0
    texts: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    resumes: int = 0
    wrong: dict[str, int] = field(default_factory=dict)
    broken_off: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    stuck: int = 0
    recovery_s: list[float] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether no token was lost, duplicated or altered, nobody is stuck, and log and devices agree."""
        return not (self.wrong or self.broken_off or self.disagreements or self.stuck)


@dataclass(frozen=True, slots=True)
class Experiment:
    """Runs one kind of fault."""

    fault: Fault
    load: Load
    moments: int
    seed: int
    quick: bool = False
    on_progress: Callable[[str], None] = lambda _line: None

    def run(self, folder: Path) -> Result:
        """Run it in a folder of its own.

        Raises:
            BenchError: The fleet does not write even without a fault, or a process ends unasked.
        """
        rng = random.Random(f"{self.seed}-{self.fault.name}")
        result = Result(self.fault.name)
        with DisturbedFleet.run(folder, self.load, seed=self.seed) as fleet:
            writing = fleet.tally.wait_for_all(self.load.devices, since=0.0, timeout_s=_FIRST_S)
            if len(writing) < self.load.devices:
                raise BenchError(f"Only {len(writing)} devices write before {self.fault.name}; see {folder}/*.log.")
            began = time.monotonic()
            for moment in range(1, self.moments + 1):
                time.sleep(rng.uniform(*_BETWEEN_S))
                self._strike(fleet, rng, moment, result)
            result.seconds = time.monotonic() - began
            fleet.stop()
            tally = fleet.tally
            result.how = fleet.disk.how if self.fault.name == "disk-full" else ""
            result.texts, result.tokens, result.resumes = dict(tally.by_mode), tally.tokens, tally.resumes
            result.wrong, result.broken_off, result.refused = dict(tally.wrong), tally.broken_off, tally.refused
            result.disagreements = disagreements(fleet.database, tally)
        return result

    def _strike(self, fleet: DisturbedFleet, rng: random.Random, moment: int, result: Result) -> None:
        fleet.tally.forget_moments()
        with self.fault.act(fleet, rng):
            time.sleep(self.fault.duration_s(rng, quick=self.quick))
        ended = time.monotonic()
        waited = fleet.tally.wait_for_all(self.load.devices, since=ended, timeout_s=_PATIENCE_S)
        result.moments = moment
        result.recovery_s += waited.values()
        result.stuck += self.load.devices - len(waited)
        slowest = max(waited.values(), default=_PATIENCE_S)
        self.on_progress(
            f"{self.fault.name} {moment}/{self.moments}: {len(waited)} of {self.load.devices} devices went on, "
            f"the last after {slowest:.2f} s; {fleet.tally.tokens} tokens so far"
        )
