"""Run of a simulation, and what comes of it; the same scenario always comes to the same."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from fleet_cli.edge.advise.service_level import Client, Level, Window
from fleet_cli.edge.advise.simulation.device import Counts, SimulatedDevice
from fleet_cli.edge.advise.simulation.edge import SimulatedEdge
from fleet_cli.edge.advise.simulation.messages import Open, SimulatedText, ToDevice, ToEdge
from fleet_cli.edge.advise.simulation.scenario import Scenario
from fleet_cli.errors import CommandError
from fleet_device.pacing.contract import Pacing

if TYPE_CHECKING:
    import simpy

_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Outcome:
    """What devices got.

    Attributes:
        scenario: That was simulated.
        devices: With the texts of each.
        window: What counts.
        counts: Of all devices, from the beginning.
        busy: Share of the time in which the edge computed.
        batch: Sessions that a step verified, on average.
        pacings: Of the devices; they may go on in another run.
    """

    scenario: Scenario
    devices: Sequence[Client]
    window: Window
    counts: Counts
    busy: float
    batch: float
    pacings: Sequence[Pacing]

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of all devices together."""
        return sum(device.tokens(self.window) for device in self.devices) / self.window.seconds

    @property
    def pace(self) -> float:
        """Tokens a second while texts are written: the median over devices."""
        return median(device.pace(self.window) for device in self.devices)

    @property
    def gap_s(self) -> float | None:
        """Time between tokens at the 95th percentile (seconds): the median over devices."""
        gaps = [gap for device in self.devices if (gap := device.gap_s(self.window)) is not None]
        return median(gaps) if gaps else None

    @property
    def first_s(self) -> float:
        """Time to the first token (seconds): the median over texts, a wait in vain as long as it was."""
        waits = [
            text.first_s(self.window.end)
            for device in self.devices
            for text in device.texts
            if text.asked_at < self.window.end
        ]
        return median(waits) if waits else 0.0

    def at_level(self, level: Level) -> int:
        """Return how many devices got a service level."""
        return sum(device.at_level(self.window, level) for device in self.devices)

    @property
    def tokens(self) -> int:
        """All that were written, from the beginning."""
        return sum(text.tokens for device in self.devices for text in device.texts)

    @property
    def streamed(self) -> float:
        """Share of the tokens that the edge wrote by itself."""
        return self.counts.streamed / max(1, self.tokens)

    @property
    def mean_draft(self) -> float:
        """Tokens of a draft, on average."""
        return self.counts.drafted / max(1, self.counts.drafts)


def simulate(scenario: Scenario, *, pacings: Sequence[Pacing] = ()) -> Outcome:
    """Simulate a scenario.

    Args:
        scenario: What.
        pacings: Of devices that have learnt before; others begin anew.

    Raises:
        CommandError: SimPy is not installed.
    """
    try:
        import simpy
    except ImportError:
        raise CommandError("The simulation needs SimPy: pip install 'dssd-fleet[edge]', or simpy alone.") from None
    env = simpy.Environment()
    counts, numbers = Counts(), itertools.count()
    one_way_s = scenario.round_trip_s / 2
    devices: list[SimulatedDevice] = []
    by_session: dict[int, SimulatedDevice] = {}

    def deliver(take: Callable[[object], None], message: object, delay_s: float) -> None:
        env.timeout(delay_s).callbacks.append(lambda _: take(message))

    def to_device(message: ToDevice, after_s: float) -> None:
        deliver(by_session[message.session].take, message, after_s + one_way_s)  # type: ignore[arg-type]

    edge = SimulatedEdge(env, scenario, to_device)

    def sender(place: int) -> Callable[[ToEdge], None]:
        def send(message: ToEdge) -> None:
            if isinstance(message, Open):
                by_session[message.session] = devices[place]
            deliver(edge.take, message, one_way_s + scenario.message_s)  # type: ignore[arg-type]

        return send

    known = list(pacings[: scenario.devices])
    known += [scenario.plan() for _ in range(scenario.devices - len(known))]
    for place, pacing in enumerate(known):
        arrivals = _arrivals(scenario, place, numbers)
        devices.append(SimulatedDevice(env, scenario, pacing, arrivals, sender(place), counts))
    window = _run(env, scenario, devices)
    return Outcome(
        scenario=scenario,
        devices=[Client([*device.texts]) for device in devices],
        window=window,
        counts=counts,
        busy=edge.busy_s / env.now if env.now else 0.0,
        batch=edge.verified / max(1, edge.steps),
        pacings=known,
    )


def _run(env: "simpy.Environment", scenario: Scenario, devices: Sequence[SimulatedDevice]) -> Window:
    """Run until the window is over, or until all texts are written where they are numbered."""
    if scenario.texts is not None:
        env.run()
        return Window(0.0, max(env.now, 1e-9))
    timing = scenario.timing
    while env.now < timing.patience_s:
        if all(device.texts and device.texts[0].pieces for device in devices):
            break
        env.run(until=env.now + max(_LOOK_S, timing.patience_s / 1000))
    served = all(device.texts and device.texts[0].pieces for device in devices)
    begin = env.now + (timing.settle_s if served else 0.0)
    env.run(until=begin + timing.window_s)
    return Window(begin, begin + timing.window_s)


def _arrivals(scenario: Scenario, place: int, numbers: Iterator[int]) -> Iterator[tuple[float, int, SimulatedText]]:
    """Return pause, number and text of a device's sessions; without end, unless texts are numbered."""
    rng = random.Random(f"{scenario.seed} {place}")  # noqa: S311 - a simulation
    guesses = random.Random(f"{scenario.seed} {place} guesses")  # noqa: S311 - likewise
    rounds = itertools.count() if scenario.texts is None else range(scenario.texts)
    for _ in rounds:
        pause_s = rng.expovariate(1.0 / scenario.pause_s) if scenario.pause_s > 0.0 else 0.0
        stands = [rng.random() < scenario.acceptance for _ in range(scenario.text_tokens)]
        guessed = [guesses.random() < scenario.guess_rate for _ in stands] if scenario.guess_rate > 0.0 else []
        yield pause_s, next(numbers), SimulatedText(stands=stands, prompt=scenario.prompt_tokens, guessed=guessed)
