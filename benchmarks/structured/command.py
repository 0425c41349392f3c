"""Structured benchmark: texts of ten JSON schemas beside free ones on the same prompts, through a real broker and edge.

Every structured text is parsed, and validated against its schema by another library than the one that constrained it.
Free and structured texts of a prompt alternate, with the same device, edge and seed; a free text is asked for as many
tokens as the structured text before it had, so that neither has more of what a text costs once, as its prompt does.
Devices draft with the real draft model and pace themselves as they do by default.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.shared.conditions import conditions
from benchmarks.structured.schemas import SCHEMAS
from broker_config.broker import Broker
from broker_config.processes.runner import MosquittoProcess
from dssd.distribution import Dist, Ids
from fleet_device.client.agent import Agent
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.pacing.contract import FixedPacing, Pacing
from fleet_device.pacing.session_pacing import make_pacing
from fleet_device.session.origins import TokenOrigin
from fleet_device.settings import DeviceSettings
from fleet_device.texts.chat import ChatMessage, encode_chat
from fleet_device.texts.generate import GeneratedText, GenerateRequest, generate_text
from fleet_link.paho_link import PahoLink
from fleet_link.settings import BrokerSettings
from schemas.grammar import Grammar
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason
from tests.support.edge_process import edge_process

__all__ = ["main"]

FLEET: Final = "structured"
_START_S: Final = 10.0


class CountingDrafter(LlamaCppDrafter):
    """The draft model, which counts how often it is asked.

    Attributes:
        calls: Of the model.
    """

    calls = 0

    def next(self, policy: SamplingPolicy) -> Dist:
        """Count, and ask."""
        self.calls += 1
        return super().next(policy)

    def next_allowed(self, policy: SamplingPolicy, allowed: Ids) -> Dist:
        """Likewise."""
        self.calls += 1
        return super().next_allowed(policy, allowed)


@dataclass(slots=True)
class Tally:
    """What texts of one kind took.

    Attributes:
        texts: How many.
        tokens: In them.
        seconds: From asking the edge to the end, summed.
        forced: Tokens that a grammar left no choice for.
        drafter_calls: Of the draft model.
        rounds: Verdicts, each with one forward pass of the large model.
        tested: Draft tokens decided on.
        accepted: Of these, accepted.
        streamed: Tokens that the edge wrote by itself.
        wrong: Structured texts that do not parse or do not validate.
    """

    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    forced: int = 0
    drafter_calls: int = 0
    rounds: int = 0
    tested: int = 0
    accepted: int = 0
    streamed: int = 0
    wrong: int = 0

    def add(self, text: GeneratedText, *, calls: int) -> None:
        """Count a text."""
        counters = text.generation.counters
        self.texts += 1
        self.tokens += len(text.tokens)
        self.seconds += text.generation.wall_ms / 1e3
        self.forced += text.origins.count(TokenOrigin.FORCED)
        self.drafter_calls += calls
        self.rounds += counters.rounds
        self.tested += counters.tested
        self.accepted += counters.accepted
        self.streamed += counters.streamed

    def json(self) -> dict[str, Any]:
        """Return the figures."""
        tokens = max(1, self.tokens)
        return {
            "texts": self.texts,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens / max(self.seconds, 1e-9),
            "seconds_per_text": self.seconds / max(1, self.texts),
            "forced_share": self.forced / tokens,
            "draft_model_calls_per_token": self.drafter_calls / tokens,
            "large_model_calls_per_token": self.rounds / tokens,
            "acceptance": self.accepted / max(1, self.tested),
            "streamed_share": self.streamed / tokens,
            "wrong": self.wrong,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Write all texts; return 1 if a structured one does not keep to its schema."""
    parser = argparse.ArgumentParser(prog="benchmarks structured", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--draft", default="Q4_0", metavar="QUANTIZATION", help="(default: %(default)s)")
    parser.add_argument("--target", default="target-Q8_0.gguf", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--engine", default="llama.cpp", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="texts of a schema (default: %(default)s)")
    parser.add_argument(
        "--free", type=int, default=10, metavar="N", help="free texts of its prompt (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=400, help="of a text, at most (default: %(default)s)")
    parser.add_argument("--mode", type=Mode, choices=list(Mode), default=Mode.RESIDUAL, help="(default: %(default)s)")
    parser.add_argument(
        "--plan", choices=["adaptive", "draft", "stream"], default="adaptive", help="(default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    drafter = CountingDrafter(LlamaCppSettings(arguments.models / f"{arguments.draft}.gguf"))
    with MosquittoProcess(Broker(fleet=FLEET)) as broker, tempfile.TemporaryDirectory() as folder:
        edge = [
            "--fleet", FLEET, "--edge", "edge-1", "--port", str(broker.port),
            "--target", str(arguments.models / arguments.target), "--engine", arguments.engine,
            "--db", f"sqlite:///{folder}/log.sqlite3", "--spool", f"{folder}/spool",
        ]  # fmt: skip
        with edge_process(edge):
            found = _measure(arguments, broker.port, drafter)
    drafter.close()
    _print(found)
    if arguments.json:
        told = {name: tally.json() for name, tally in found.items()}
        held = {**conditions("llama-cpp-python", "llguidance", broker=True), "plan": arguments.plan, "rows": told}
        arguments.json.write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n")
    return 1 if any(tally.wrong for tally in found.values()) else 0


def _measure(arguments: argparse.Namespace, port: int, drafter: CountingDrafter) -> dict[str, Tally]:
    link = PahoLink(BrokerSettings(port=port).link("device-1", will=None))
    agent = Agent(link, FLEET, "device-1", drafter, _pacing(arguments), time.monotonic)
    agent.attach()
    link.start(timeout_s=_START_S)
    found: dict[str, Tally] = {"free": Tally(), "structured": Tally()}
    try:
        for name, (asked, schema) in SCHEMAS.items():
            prompt = tuple(encode_chat(drafter.codec, [ChatMessage("user", asked)]))
            found[name] = Tally()
            print(f"{name}: {arguments.repeats} texts, {arguments.free} free ones …", file=sys.stderr, flush=True)
            grammar = Grammar.json_schema(schema)
            _write(agent, drafter, prompt, arguments, seed=0, grammar=grammar, tokens=8)  # prepared once at both ends
            for number in range(arguments.repeats):
                text, calls = _write(
                    agent, drafter, prompt, arguments, seed=number, grammar=grammar, tokens=arguments.tokens
                )
                wrong = _wrong(text, schema)
                for tally in (found["structured"], found[name]):
                    tally.add(text, calls=calls)
                    tally.wrong += bool(wrong)
                if wrong:
                    print(f"{name}, seed {number}: {wrong}: {text.text!r}", file=sys.stderr)
                if number < arguments.free:
                    text, calls = _write(
                        agent, drafter, prompt, arguments, seed=number, grammar=None, tokens=len(text.tokens)
                    )
                    found["free"].add(text, calls=calls)
    finally:
        link.stop()
    return found


def _pacing(arguments: argparse.Namespace) -> Pacing:
    if arguments.plan == "adaptive":
        return make_pacing(DeviceSettings(fleet=FLEET, device="device-1"))
    return FixedPacing(32, stream=True) if arguments.plan == "stream" else FixedPacing(5)


def _write(
    agent: Agent,
    drafter: CountingDrafter,
    prompt: tuple[int, ...],
    arguments: argparse.Namespace,
    *,
    seed: int,
    grammar: Grammar | None,
    tokens: int,
) -> tuple[GeneratedText, int]:
    policy = SamplingPolicy(mode=arguments.mode, temperature=0.7, top_k=50, top_p=0.95, seed=seed, grammar=grammar)
    before = drafter.calls
    text = generate_text(agent, drafter, GenerateRequest(prompt, policy, tokens))
    return text, drafter.calls - before


def _wrong(text: GeneratedText, schema: dict[str, Any]) -> str:
    """Return what is wrong with a structured text; nothing if it is what was asked for."""
    import jsonschema  # noqa: PLC0415 - few suites need it

    if text.reason is not EndReason.STOP:
        return f"ended by {text.reason.value}"
    try:
        jsonschema.validate(json.loads(text.text), schema, format_checker=jsonschema.FormatChecker())
    except json.JSONDecodeError as error:
        return f"no JSON: {error}"
    except jsonschema.ValidationError as error:
        return f"not of the schema: {error.message}"
    return ""


def _print(found: dict[str, Tally]) -> None:
    print(
        f"{'':12} {'texts':>6} {'wrong':>6} {'tokens/s':>9} {'forced':>7} {'draft calls':>12} "
        f"{'large calls':>12} {'accepted':>9}"
    )
    for name, tally in found.items():
        row = tally.json()
        print(
            f"{name:12} {row['texts']:6} {row['wrong']:6} {row['tokens_per_s']:9.1f} {row['forced_share']:7.2f} "
            f"{row['draft_model_calls_per_token']:12.2f} {row['large_model_calls_per_token']:12.2f} "
            f"{row['acceptance']:9.2f}"
        )
    free, structured = found["free"].json(), found["structured"].json()
    if free["texts"]:
        print(
            f"structured / free: {structured['tokens_per_s'] / free['tokens_per_s']:.2f} tokens/s; calls are per token"
        )


if __name__ == "__main__":
    sys.exit(main())
