"""Conversation benchmark: what each turn computes at the edge and on the device, and the time to its first token.

A real edge, a real mosquitto and a real device. The user asks, turn after turn, with all that was said before; only
what is new is to be computed, at both ends. Then many devices begin with one system prompt at the same moment, and it
is to be computed once. Tokens are counted: the edge's from its session log, the device's in its draft model.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.conversation.counted import BLOCK, Shared, Turn, counts_of
from benchmarks.conversation.questions import QUESTIONS, rules, system_of
from benchmarks.conversation.report import first_ratios, missed_goals, show
from benchmarks.conversation.together import common_tokens, write_together
from benchmarks.conversation.turns import MeteredDrafter, Written, converse
from benchmarks.shared.conditions import conditions
from benchmarks.shared.ending import ending_cleanly
from broker_config.broker import Broker
from broker_config.errors import BrokerError
from broker_config.processes.runner import MosquittoProcess
from fleet_device.device import Device
from fleet_device.drafters.gguf import GgufModel
from fleet_device.drafters.llama_cpp import LlamaCppSettings
from fleet_device.settings import DeviceSettings
from fleet_device.texts.chat import ChatMessage, encode_chat
from fleet_link.paho_link import PahoLink
from fleet_link.settings import BrokerSettings
from schemas.errors import FleetError
from schemas.policy import Mode
from tests.support.edge_process import edge_process

__all__ = ["main"]

FLEET: Final = "conversation"
EDGE: Final = "edge-1"
ENGINES: Final = {"llama.cpp": "target-Q8_0.gguf", "packed": "target"}
"""By engine, its target in the folder of the prepared models."""

_CONTEXT: Final = 2048
_SETTINGS: Final = {"llama.cpp": ("--engine", "llama.cpp", "--context", str(_CONTEXT)), "packed": ("--engine", "torch")}
_ONLINE_S: Final = 30.0
Spoken = tuple[int, bool, Written]
"""Number of the conversation, whether it had its device for itself, and a turn."""

_FEW: Final = 4  # tokens of the texts that begin alike


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each engine; return 0 if only what is new was computed and no turn begins late, else 1; 2 on errors."""
    arguments = _read(argv)
    turns: list[Turn] = []
    shared: list[Shared] = []
    try:
        with ending_cleanly():
            for engine in arguments.engines:
                found, together = _measure(engine, arguments)
                turns += found
                shared += together
                show(found, together)
    except (FleetError, BrokerError) as error:
        print(error, file=sys.stderr)
        return 2
    missed = missed_goals(turns, shared)
    print("\n".join(missed) or "all goals are met", flush=True)
    if arguments.json is not None:
        content = {
            **conditions("llama-cpp-python", "torch", "transformers", "paho-mqtt", broker=True),
            "settings": {name: str(value) for name, value in vars(arguments).items() if name != "json"},
            "block_tokens": BLOCK,
            "rows": [turn.row() for turn in turns],
            "together": [each.row() for each in shared],
            "first_token_ratio": first_ratios(turns),
            "missed": missed,
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 1 if missed else 0


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks conversation", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--draft", default="Q4_0", help="quantization of the draft model (default: %(default)s)")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--turns", type=int, default=10, help=f"2 to {len(QUESTIONS)} (default: %(default)s)")
    parser.add_argument("--conversations", type=int, default=3, help="one after the other (default: %(default)s)")
    parser.add_argument("--taking-turns", type=int, default=2, help="more, that take turns at one device; 0 for none")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer, at most (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=32, help="that begin alike at once; 0 for none")
    parser.add_argument("--system-tokens", type=int, default=500, help="that they begin with (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the edge; the device has one (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="of the target in the engine packed")
    parser.add_argument("--mode", type=Mode, default=Mode.RESIDUAL, choices=list(Mode))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args(argv)
    if not 2 <= arguments.turns <= len(QUESTIONS) or arguments.conversations < 0 or arguments.tokens < 1:
        parser.error(f"--turns must be 2 to {len(QUESTIONS)}, --conversations at least 0, --tokens at least 1")
    if 1 in (arguments.devices, arguments.taking_turns) or min(arguments.devices, arguments.taking_turns) < 0:
        parser.error("--devices and --taking-turns must each be 0, or at least 2")
    # An edge lets a device open 18 sessions at once, and 24 a minute.
    if arguments.taking_turns * arguments.turns > 40:
        parser.error("--taking-turns times --turns must be at most 40")
    return arguments


def _measure(engine: str, arguments: argparse.Namespace) -> tuple[list[Turn], list[Shared]]:
    target = arguments.models / ENGINES[engine]
    codec = GgufModel(arguments.models / f"{arguments.draft}.gguf", vocabulary_only=True)
    prompts = _alike(codec, arguments.devices, arguments.system_tokens)
    spoken: list[Spoken] = []
    sharing: list[str] = []
    with MosquittoProcess(Broker(fleet=FLEET)) as broker, tempfile.TemporaryDirectory() as folder:
        log = f"sqlite:///{folder}/log.sqlite3"
        edge = [
            "--fleet", FLEET, "--edge", EDGE, "--port", str(broker.port), "--target", str(target),
            *_SETTINGS[engine], "--dtype", arguments.dtype, "--threads", str(arguments.threads),
            "--db", log, "--spool", f"{folder}/spool",
        ]  # fmt: skip
        with edge_process(edge):
            for number in range(arguments.conversations):
                spoken += _converse(broker.port, [number], arguments)
            if arguments.taking_turns:
                first = arguments.conversations
                numbers = range(first, first + arguments.taking_turns)
                spoken += _converse(broker.port, numbers, arguments)
            if prompts:
                settings = BrokerSettings(port=broker.port)
                sharing = write_together(
                    prompts,
                    make_link=lambda name: PahoLink(settings.link(name, will=None)),
                    fleet=FLEET,
                    codec=codec,
                    tokens=_FEW,
                )
        counts = counts_of(log, [*(turn.session for _, _, turn in spoken), *sharing])
    codec.close()
    turns = [Turn(engine, number, alone, turn, counts[turn.session]) for number, alone, turn in spoken]
    if not prompts:
        return turns, []
    common = common_tokens(prompts)
    return turns, [Shared.of(engine, prompts, common=common, counts=[counts[session] for session in sharing])]


def _converse(port: int, numbers: Sequence[int], arguments: argparse.Namespace) -> list[Spoken]:
    """Hold conversations that take turns at one device."""
    settings = DeviceSettings(
        fleet=FLEET,
        device=f"device-{numbers[0]}",  # each with quotas of its own
        broker=BrokerSettings(port=port),
        mode=arguments.mode,
        draft_length=4,  # one that chooses may have its edge write, and compute nothing
        stream=False,
        seed=numbers[0],
        context=_CONTEXT,
    )
    drafter = MeteredDrafter(
        LlamaCppSettings(path=arguments.models / f"{arguments.draft}.gguf", threads=1, context=_CONTEXT)
    )
    with Device(settings, load=lambda _settings: drafter) as device:
        device.wait_for_edge(_ONLINE_S)
        found = converse(
            device,
            drafter,
            QUESTIONS[: arguments.turns],
            systems=[system_of(number) for number in numbers],
            tokens=arguments.tokens,
        )
    alone = len(numbers) == 1
    return [(number, alone, turn) for number, turns in zip(numbers, found, strict=True) for turn in turns]


def _alike(codec: GgufModel, devices: int, tokens: int) -> list[list[int]]:
    """Return prompts that begin with the same rules and end with a question each."""
    if not devices:
        return []
    system = ChatMessage("system", rules(lambda text: len(codec.encode(text)), tokens=tokens))
    return [
        encode_chat(codec, [system, ChatMessage("user", f"Report {number}: {QUESTIONS[number % len(QUESTIONS)]}")])
        for number in range(devices)
    ]


if __name__ == "__main__":
    sys.exit(main())
