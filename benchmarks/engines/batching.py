"""Batching: committed tokens for a second of edge compute, with eight devices verified together and with one.

One real edge process over the real target in torch, and devices that replay recorded drafts, so that eight draft
models need not share the machine's cores with it. A replayed draft is the text itself with every fourth token wrong,
so that it is accepted about as far as a realistic one. The figures come from the edge's own session log. Takes 5
minutes.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from typing import Any, Final

import sqlalchemy as sa

from benchmarks.harness import Bench, Report, at_least, connected, number_of, say, table, together
from fleet_admin.models.prompts import PROMPTS
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.model_file import GgufModel
from fleet_device.drafters.without_model import NoDrafter
from fleet_device.pacing.contract import FixedPacing
from fleet_device.requests.chat import encode_chat
from fleet_device.requests.generate import GenerateRequest
from fleet_device.requests.structured import ChatMessage
from schemas.policy import Mode, SamplingPolicy
from tests.support.recorded_drafter import RecordedDrafter, mostly_right

_QUERY: Final = "SELECT sum(batch) * 1.0 / count(*), sum(compute_ms / batch) FROM rounds WHERE batch > 0"
_BATCH: Final = 3.0
_RATIO: Final = 1.0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=number_of(int, 2), default=8, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=number_of(int, 1), default=64, help="of each text (default: %(default)s)")
    parser.add_argument("--draft-length", type=number_of(int, 1), default=4, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="replayed drafts need the same text again")


def run(bench: Bench) -> Report:
    options, target = bench.options, bench.model("target")
    rows: list[dict[str, Any]] = []
    with closing(GgufModel(bench.model("Q4_1.gguf"), vocabulary_only=True)) as codec, bench.broker() as broker:
        asked = [PROMPTS[number % len(PROMPTS)] for number in range(options.devices)]
        prompts = [encode_chat(codec, [ChatMessage("user", text)]) for text in asked]

        def write(drafters: Sequence[Drafter], length: int) -> list[tuple[int, ...]]:
            pacing = FixedPacing(length)
            with connected(broker.port, bench.fleet, drafters, pacing=lambda: pacing) as agents:
                calls = [
                    lambda n=n, agent=agent: agent.generate(
                        GenerateRequest(
                            tuple(prompts[n]),
                            policy=SamplingPolicy(mode=Mode.COUPLED, seed=n),
                            max_new_tokens=options.tokens,
                        )
                    )
                    for n, agent in enumerate(agents)
                ]
                return [done.tokens for done in together(calls)]

        edge = {"engine": "torch", "dtype": options.dtype}
        with bench.edge(broker.port, target, **edge):
            say(f"recording {options.devices} texts")
            texts = write([NoDrafter(codec.vocabulary, codec, context=1 << 17) for _ in prompts], 0)
        for count in (1, options.devices):
            drafters = [RecordedDrafter(codec, codec.vocabulary) for _ in range(count)]
            for drafter, prompt, text in zip(drafters, prompts, texts, strict=False):
                drafter.play(mostly_right(prompt, text, SamplingPolicy(seed=0), codec.vocabulary))
            with bench.edge(broker.port, target, **edge) as served:
                write(drafters, options.draft_length)
            rows.append({"devices": count, **_figures(served.log)})
    table(rows, {"devices": "d", "tokens": "d", "mean_batch": ".2f", "tokens_per_compute_s": ".1f"})
    ratio = rows[1]["tokens_per_compute_s"] / rows[0]["tokens_per_compute_s"]
    what = f"tokens for a second of edge compute, {options.devices} devices over one"
    return Report(rows, [at_least(what, ratio, _RATIO), at_least("mean batch", rows[1]["mean_batch"], _BATCH)])


def _figures(url: str) -> dict[str, Any]:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        batch, compute_ms = connection.execute(sa.text(_QUERY)).one()
        tokens = int(connection.execute(sa.text("SELECT sum(tokens) FROM sessions")).scalar_one())
    engine.dispose()
    return {"tokens": tokens, "mean_batch": batch, "tokens_per_compute_s": tokens / compute_ms * 1e3}
