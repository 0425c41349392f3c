"""Pacing benchmark: chosen draft lengths beside the best of fixed plans, near the edge and far from it.

One device with a real draft model, one edge over the real target, a real mosquitto, and between device and broker a
relay that is as far away as the round trip says. For each round trip and draft model the same texts are written under
each plan in turn, so that whatever else the machine does hits all of them alike; in coupled mode they come out equal
under every plan. Counted is from a text's first tokens to its last, so that reading the prompt is left out. The
choosing device starts each column knowing nothing, and learns from text to text, as a service does.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from broker_config.broker import Broker
from broker_config.processes.runner import MosquittoProcess
from fleet_cli.demo.prompts import PROMPTS
from fleet_device.client.agent import Agent
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import FixedPacing, Pacing
from fleet_device.texts.chat import ChatMessage, encode_chat
from fleet_link.paho_link import PahoLink
from fleet_link.settings import BrokerSettings
from fleet_testing.edge_process import real_edge
from fleet_testing.relay import Relay
from schemas.policy import Mode, SamplingPolicy

__all__ = ["Column", "Row", "main"]

FLEET: Final = "pacing"
DEVICE: Final = "device-1"
CHOSEN: Final = "auto"
USUAL: Final = "4"
FIXED: Final = {"2": FixedPacing(2), USUAL: FixedPacing(4), "8": FixedPacing(8), "4 ahead": FixedPacing(4, ahead=True)}
NOT_WORSE: Final = 0.9


@dataclass(slots=True)
class Row:
    """What was written under one plan.

    Attributes:
        tokens: Committed behind the first ones, by text.
        seconds: That they took, by text.
        drafted: Draft tokens sent.
        drafts: Sent.
        tested: Draft tokens that were decided on.
        accepted: Of them, accepted.
    """

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    drafted: int = 0
    drafts: int = 0
    tested: int = 0
    accepted: int = 0

    def rate(self, *, after: int = 0) -> float:
        """Return tokens a second, the first `after` texts left out."""
        return sum(self.tokens[after:]) / sum(self.seconds[after:])


@dataclass(slots=True)
class Column:
    """One draft model at one distance.

    Attributes:
        draft: Its quantization.
        round_trip_ms: Between device and broker.
        rows: By plan.
    """

    draft: str
    round_trip_ms: int
    rows: dict[str, Row] = field(default_factory=dict)

    def against_best(self, *, after: int = 0) -> float:
        """Return the chosen plans' rate, as a ratio to the best fixed plan's."""
        return self.rows[CHOSEN].rate(after=after) / max(self.rows[plan].rate(after=after) for plan in FIXED)

    def against_usual(self, *, after: int = 0) -> float:
        """Return the same, to the usual plan's."""
        return self.rows[CHOSEN].rate(after=after) / self.rows[USUAL].rate(after=after)


def measure(port: int, drafter: Drafter, column: Column, *, mode: Mode, first: int, texts: int, tokens: int) -> None:
    """Write the texts, from the `first` prompt and seed on, under every plan in turn, and fill the column."""
    plans: dict[str, Pacing] = {**FIXED, CHOSEN: AdaptivePacing()}
    column.rows = {plan: Row() for plan in plans}
    with Relay(port, round_trip_s=column.round_trip_ms / 1e3) as relay:
        link = PahoLink(BrokerSettings(port=relay.port).link(DEVICE, will=None))
        agent = Agent(link, FLEET, DEVICE, drafter, FIXED[USUAL], time.monotonic)
        agent.attach()
        link.start(timeout_s=10.0)
        try:
            for number in range(first, first + texts):
                prompt = encode_chat(drafter.codec, [ChatMessage("user", PROMPTS[number % len(PROMPTS)])])
                for plan, row in column.rows.items():
                    agent.pacing = plans[plan]
                    _write(agent, prompt, SamplingPolicy(mode=mode, seed=number), tokens, row)
        finally:
            link.stop()


def _write(agent: Agent, prompt: Sequence[int], policy: SamplingPolicy, tokens: int, row: Row) -> None:
    committed: list[tuple[float, int]] = []
    done = agent.generate(
        prompt,
        policy=policy,
        max_new_tokens=tokens,
        on_tokens=lambda new: committed.append((time.monotonic(), len(new))),
    )
    (first, head), (last, _) = committed[0], committed[-1]
    row.tokens.append(len(done.tokens) - head)
    row.seconds.append(last - first)
    row.drafted += done.counters.drafted
    row.drafts += done.drafts
    row.tested += done.counters.tested
    row.accepted += done.counters.accepted


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all columns; return 0 if choosing is on average at least 0.9 times as fast as the usual plan."""
    parser = argparse.ArgumentParser(prog="fleet bench pacing", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--drafts", nargs="+", default=["Q4_0", "Q4_1"], help="quantizations (default: %(default)s)")
    parser.add_argument("--round-trips", nargs="+", type=int, default=[0, 50, 200], metavar="MS")
    parser.add_argument("--texts", type=int, default=4, help="texts under each plan (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first text's prompt and seed")
    parser.add_argument("--tokens", type=int, default=64, help="of each text, at most (default: %(default)s)")
    parser.add_argument("--mode", type=Mode, default=Mode.COUPLED, choices=list(Mode))
    parser.add_argument("--dtype", default="auto", help="of the target model")
    parser.add_argument("--threads", type=int, default=1, help="of the edge; the device has one (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one short text, round trips 0 and 200 ms, one draft")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.texts, arguments.tokens, arguments.round_trips, arguments.drafts = 1, 24, [0, 200], ["Q4_0"]
    columns = []
    with (
        MosquittoProcess(Broker(fleet=FLEET)) as broker,
        tempfile.TemporaryDirectory() as folder,
        real_edge(
            broker.port,
            fleet=FLEET,
            models=arguments.models,
            folder=Path(folder),
            dtype=arguments.dtype,
            threads=arguments.threads,
        ),
    ):
        write = partial(
            measure,
            broker.port,
            mode=arguments.mode,
            first=arguments.first,
            texts=arguments.texts,
            tokens=arguments.tokens,
        )
        for draft in arguments.drafts:
            drafter = LlamaCppDrafter(LlamaCppSettings(path=arguments.models / f"{draft}.gguf", threads=1))
            for round_trip_ms in arguments.round_trips:
                column = Column(draft, round_trip_ms)
                write(drafter, column)
                columns.append(column)
                print(_lines(column), flush=True)
            drafter.close()
    best = _mean([column.against_best() for column in columns])
    usual = _mean([column.against_usual() for column in columns])
    print(
        f"auto against the best fixed plan of each column: {best:.2f}, against {USUAL}: {usual:.2f} (geometric means)"
    )
    if arguments.json is not None:
        report = {"against_best": best, "against_usual": usual, "columns": [asdict(column) for column in columns]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if usual >= NOT_WORSE else 1


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))


def _lines(column: Column) -> str:
    head = f"draft {column.draft}, round trip {column.round_trip_ms} ms"
    lines = [f"{head:<32} tokens/s  mean draft  acceptance"]
    for plan, row in column.rows.items():
        acceptance = f"{row.accepted / row.tested:10.2f}" if row.tested else f"{'-':>10}"
        lines.append(f"  {plan:<30} {row.rate():8.1f}  {row.drafted / row.drafts:10.1f}  {acceptance}")
    lines.append(
        f"  auto: {column.against_best():.2f} times the best fixed plan, {column.against_usual():.2f} times {USUAL}"
    )
    if len(column.rows[CHOSEN].tokens) > 1:
        later = f"{column.against_best(after=1):.2f} and {column.against_usual(after=1):.2f}"
        lines.append(f"  from the second text on, when it has learnt: {later}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
