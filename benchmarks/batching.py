"""Batching benchmark: does verifying many devices together buy more text for the same edge compute?

One real edge process over the real target; devices that replay recorded drafts, so that eight drafters need not share
the machine's cores with it. A replayed draft is the text itself with every fourth token spoilt, so that a draft is
accepted about as far as a realistic one. First one device, then eight at once, in one run; the figures come from the
edge's own session log.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from broker_config.broker import Broker
from broker_config.processes.runner import MosquittoProcess
from fleet_cli.demo.prompts import PROMPTS
from fleet_device.client.agent import Agent
from fleet_device.drafters.gguf import GgufModel
from fleet_device.pacing.contract import FixedPacing
from fleet_device.texts.chat import ChatMessage, encode_chat
from fleet_link.paho_link import PahoLink
from fleet_link.settings import BrokerSettings
from schemas.policy import Mode, SamplingPolicy
from tests.support.edge_process import real_edge
from tests.support.replay_drafter import ReplayDrafter

__all__ = ["Figures", "main"]

FLEET = "batching"


@dataclass(frozen=True, slots=True)
class Figures:
    """What one load came to.

    Attributes:
        devices: At once.
        tokens: Committed, all together.
        mean_batch: Sessions in a verification step, as a verdict meets it.
        edge_compute_s: Sum of the verification steps' time.
        tokens_per_compute_s: Committed tokens for each second of it.
        wall_s: From the first Open to the last Close.
        tokens_per_wall_s: Committed tokens for each second of that.
    """

    devices: int
    tokens: int
    mean_batch: float
    edge_compute_s: float
    tokens_per_compute_s: float
    wall_s: float
    tokens_per_wall_s: float


def _write(
    port: int, number: int, drafter: ReplayDrafter, prompt: Sequence[int], pacing: FixedPacing, tokens: int
) -> tuple[int, ...]:
    name = f"device-{number}"
    link = PahoLink(BrokerSettings(port=port).link(name, will=None))
    agent = Agent(link, FLEET, name, drafter, pacing, time.monotonic)
    agent.attach()
    link.start(timeout_s=10.0)
    try:
        policy = SamplingPolicy(mode=Mode.COUPLED, seed=number)
        return agent.generate(prompt, policy=policy, max_new_tokens=tokens).tokens
    finally:
        link.stop()


def _measure(db: Path, devices: int, wall_s: float) -> Figures:
    engine = sa.create_engine(f"sqlite:///{db}")
    query = sa.text(
        "SELECT count(*) AS n, sum(batch) AS batches, sum(compute_ms / batch) AS ms FROM rounds WHERE batch > 0"
    )
    with engine.connect() as connection:
        row = connection.execute(query).mappings().one()
        tokens = int(connection.execute(sa.text("SELECT sum(tokens) FROM sessions")).scalar_one())
    engine.dispose()
    compute_s = row["ms"] / 1e3
    return Figures(devices, tokens, row["batches"] / row["n"], compute_s, tokens / compute_s, wall_s, tokens / wall_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Run both loads and print the ratio."""
    parser = argparse.ArgumentParser(prog="benchmarks batching", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument(
        "--dtype", default="float32", help="replayed drafts need the same text again (default: float32)"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    codec = GgufModel(arguments.models / "Q4_1.gguf", vocabulary_only=True)
    prompts = [encode_chat(codec, [ChatMessage("user", PROMPTS[n % len(PROMPTS)])]) for n in range(arguments.devices)]
    vocabulary, pacing = codec.vocabulary, FixedPacing(arguments.draft_length)
    with MosquittoProcess(Broker(fleet=FLEET)) as broker, tempfile.TemporaryDirectory() as folder:
        edge = partial(
            real_edge,
            broker.port,
            fleet=FLEET,
            models=arguments.models,
            folder=Path(folder),
            dtype=arguments.dtype,
        )
        with edge(log="record"):
            print(f"recording {arguments.devices} texts …", file=sys.stderr)
            texts = [
                _write(broker.port, n, ReplayDrafter(codec, vocabulary, ()), prompt, FixedPacing(0), arguments.tokens)
                for n, prompt in enumerate(prompts)
            ]
        figures = []
        for count in (1, arguments.devices):
            with edge(log=f"load-{count}") as db, ExitStack() as stack:
                started = time.monotonic()
                for number in range(count):
                    drafter = ReplayDrafter(codec, vocabulary, (*prompts[number], *texts[number]))
                    thread = threading.Thread(
                        target=_write,
                        args=(broker.port, number, drafter, prompts[number], pacing, arguments.tokens),
                    )
                    thread.start()
                    stack.callback(thread.join)
                stack.close()
                wall_s = time.monotonic() - started
            figures.append(_measure(db, count, wall_s))
    codec.close()
    one, many = figures
    for each in figures:
        print(
            f"{each.devices} device{'s' * (each.devices > 1)}: {each.tokens} tokens, mean batch {each.mean_batch:.2f}, "
            f"{each.tokens_per_compute_s:.1f} tokens per second of edge compute, {each.tokens_per_wall_s:.1f} in all"
        )
    ratio = many.tokens_per_compute_s / one.tokens_per_compute_s
    print(f"{many.devices} devices against 1: {ratio:.2f} times the tokens per second of edge compute")
    if arguments.json is not None:
        content = {"ratio": ratio, "loads": [asdict(each) for each in figures]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if many.mean_batch > 3 and ratio > 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
