"""Conversation: tokens that each turn computes at the edge and on the device, and milliseconds to its first token.

A real edge, a real mosquitto and a real device. The user asks, turn after turn, with all that was said before; only
what is new is to be computed, at both ends. Then many devices begin with one system prompt at the same moment, which
is to be computed once. Tokens are counted: the edge's from its session log, the device's in its draft model. 5
minutes.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile
from statistics import median
from typing import Any, Final

from benchmarks.harness import Bench, BenchGoal, SuiteReport, at_most, connected, number_of, table, together
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.device import Device
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.drafters.model_file import GgufModel
from fleet_device.drafters.without_model import NoDrafter
from fleet_device.requests.chat import chat_prompt
from fleet_device.requests.generate import GenerateRequest
from fleet_device.requests.structured import ChatMessage
from fleet_device.settings import DeviceSettings
from fleet_edge.session_log.log import SessionLog
from sampling.distribution import Dist
from schemas.policy import Mode, SamplingPolicy

# Of similar length, so that the turns' times to the first token can be compared.
QUESTIONS: Final = (
    "Which vegetables grow well on a small balcony in spring?",
    "How much water does each of them need on a hot day?",
    "What kind of soil should I buy for the first pots?",
    "Which of these plants should not stand beside each other?",
    "How can I keep snails away without using any poison?",
    "When is the best time of the year to sow beans?",
    "How do I know that the tomatoes are ripe enough to pick?",
    "What should I do with the plants before the first frost?",
    "Which tools will I really need for all of this work?",
    "Can you sum up the most important points of what you said?",
)

_RULES: Final = (
    "Read the whole report of the machine before you answer anything about it.",
    "Name the part that has failed first, and then what may have led to its failure.",
    "Give every measured value with its unit, and say when it was measured.",
    "If a value is missing from the report, say so and do not make one up.",
    "Write short sentences that a mechanic can read on a small screen.",
    "Never advise anybody to open the housing while the machine has power.",
    "Say what to check next, in the order in which it takes the least time.",
    "Answer in the language in which the question was asked.",
)


def system_of(conversation: int) -> str:
    """Return a conversation's system prompt; no two begin alike."""
    return f"Talk {conversation}: you help people who garden, and you answer in a few short sentences."


def rules(count: Callable[[str], int], *, tokens: int) -> str:
    lines: list[str] = []
    while not lines or count("\n".join(lines)) < tokens:
        lines.append(f"Rule {len(lines) + 1}. {_RULES[len(lines) % len(_RULES)]}")
    return "\n".join(lines)


_ENGINES: Final = {"llama.cpp": "target-Q8_0.gguf", "torch": "target"}
_CONTEXT: Final = 2048
_ONLINE_S: Final = 30.0
_FEW: Final = 4  # output tokens for the prompts that begin alike
_BLOCK: Final = 16
"""Tokens that may be computed in addition to the new ones; computing fewer costs about as much as copying them."""

_MAX_SLOWER: Final = 1.3
"""Time to the first token of the last turn, over that of the second."""

_COUNTED: Final = {
    "prompt_tokens": ".0f", "new_tokens": ".0f", "edge_computed": ".0f", "device_computed": ".0f", "beyond_new": ".0f",
    "first_token_ms": ".0f",
}  # fmt: skip


class MeteredDrafter(LlamaCppDrafter):
    """A draft model that counts the tokens computed for a request's first row."""

    def __init__(self, settings: LlamaCppSettings) -> None:
        super().__init__(settings)
        self.prompt_computed = 0
        self._before: int | None = 0

    def begin(self) -> None:
        self.prompt_computed, self._before = 0, self.tokens_computed

    def next(self, policy: SamplingPolicy) -> Dist:
        """Compute what is pending, as `LlamaCppDrafter` does."""
        dist = super().next(policy)
        if self._before is not None:
            self.prompt_computed, self._before = self.tokens_computed - self._before, None
        return dist


@dataclass(slots=True)
class _Talk:
    """A conversation, and the number of its tokens that both ends know."""

    messages: list[ChatMessage]
    known: int = 0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft", default="Q4_0", help="quantization of the draft model (default: %(default)s)")
    parser.add_argument("--engines", nargs="+", choices=list(_ENGINES), default=list(_ENGINES))
    parser.add_argument("--turns", type=int, choices=range(2, len(QUESTIONS) + 1), default=10, metavar="2…10")
    parser.add_argument("--conversations", type=number_of(int, 0), default=3, help="one after the other")
    parser.add_argument("--tokens", type=number_of(int, 1), default=48, help="of each answer, at most")
    parser.add_argument("--devices", type=number_of(int, 0), default=32, help="that begin alike at once; 0 for none")
    parser.add_argument("--system-tokens", type=number_of(int, 1), default=500, help="that they begin with")
    parser.add_argument("--mode", type=Mode, default=Mode.RESIDUAL, choices=list(Mode))


def run(bench: Bench) -> SuiteReport:
    rows: list[dict[str, Any]] = []
    shared: list[dict[str, Any]] = []
    for engine in bench.options.engines:
        turns, alike = _measure(bench, engine)
        by_turn = [[row for row in turns if row["turn"] == turn] for turn in sorted({row["turn"] for row in turns})]
        middle = [{"turn": each[0]["turn"], **{n: median(r[n] for r in each) for n in _COUNTED}} for each in by_turn]
        table(middle, {"turn": ".0f"} | _COUNTED, title=f"{engine}, one conversation after the other")
        rows += turns
        shared += alike
    table(shared, {"engine": "", "devices": "d", "common_tokens": "d", "computed": "d", "allowed": "d", "reused": "d"})
    return SuiteReport(rows, list(_goals(rows, shared)), more={"shared": shared})


def _goals(rows: Sequence[dict[str, Any]], shared: Sequence[dict[str, Any]]) -> Iterator[BenchGoal]:
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine]
        yield at_most(
            f"{engine}: tokens computed in addition to new ones", max(row["beyond_new"] for row in own), _BLOCK
        )
        first = {n: [r["first_token_ms"] for r in own if r["turn"] == n] for n in (2, own[-1]["turn"])}
        if len(first) == 2 and all(first.values()):
            second, last = map(median, first.values())
            yield at_most(f"{engine}: first token of the last turn over the second's", last / second, _MAX_SLOWER)
    for each in shared:
        yield at_most(
            f"{each['engine']}: tokens computed of prompts that begin alike", each["computed"], each["allowed"]
        )


def _measure(bench: Bench, engine: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    options = bench.options
    settings: dict[str, Any] = {"context": _CONTEXT} if engine == "llama.cpp" else {}
    settings["prefix_sharing"] = "all"
    turns: list[dict[str, Any]] = []
    sessions: list[str] = []
    with (
        closing(GgufModel(bench.model(f"{options.draft}.gguf"), vocabulary_only=True)) as codec,
        bench.broker() as broker,
    ):
        prompts = _alike(codec, options.devices, options.system_tokens)
        with bench.edge(broker.port, bench.model(_ENGINES[engine]), engine=engine, threads=1, **settings) as edge:
            for number in range(options.conversations):
                turns += _converse(bench, broker.port, number)
            if prompts:
                sessions = _write_together(bench, broker.port, codec, prompts)
    log = SessionLog(edge.log)  # complete, now that the edge has ended
    for row in turns:
        counted = log.session(row["session"]).counted
        row |= {"engine": engine, "edge_computed": counted.prefill_tokens + 1, "edge_reused": counted.reused_tokens}
        row["beyond_new"] = max(row["edge_computed"], row["device_computed"]) - row["new_tokens"]
    if not prompts:
        return turns, []
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))
    own = sum(len(prompt) - common for prompt in prompts)
    counts = [log.session(session).counted for session in sessions]
    alike = {
        "engine": engine,
        "devices": len(prompts),
        "common_tokens": common,
        "own_tokens": own,
        "computed": sum(each.prefill_tokens + 1 for each in counts),
        "allowed": common + own + len(prompts) * _BLOCK,
        "reused": sum(each.reused_tokens for each in counts),
    }
    return turns, [alike]


def _converse(bench: Bench, port: int, number: int) -> list[dict[str, Any]]:
    options = bench.options
    settings = DeviceSettings(
        fleet=bench.fleet,
        device=f"device-{number}",  # each with quotas of its own
        broker=BrokerSettings(port=port),
        mode=options.mode,
        draft_length=4,  # a choosing device may use edge-only decoding, and compute nothing
        edge_only=False,
        seed=number,
        context=_CONTEXT,
    )
    drafter = MeteredDrafter(LlamaCppSettings(bench.model(f"{options.draft}.gguf"), threads=1, context=_CONTEXT))
    talk = _Talk([ChatMessage("system", system_of(number))])
    rows = []
    with Device(settings, load=lambda _settings: drafter) as device:
        device.wait_for_edge(_ONLINE_S)
        for turn, question in enumerate(QUESTIONS[: options.turns], start=1):
            row = _ask(device, drafter, talk, question, tokens=options.tokens)
            rows.append({"conversation": number, "turn": turn, **row})
    return rows


def _ask(device: Device, drafter: MeteredDrafter, talk: _Talk, question: str, *, tokens: int) -> dict[str, Any]:
    talk.messages.append(ChatMessage("user", question))
    drafter.begin()
    asked = time.monotonic()
    first_at: float | None = None
    with device.stream(talk.messages, max_new_tokens=tokens) as stream:
        for piece in stream.pieces():
            if first_at is None and piece.tokens:
                first_at = time.monotonic()
        text = stream.result()
    talk.messages.append(ChatMessage("assistant", text.text))
    prompt, known = len(text.request.prompt), talk.known
    talk.known = prompt + len(text.tokens)
    return {
        "session": text.session,
        "prompt_tokens": prompt,
        "new_tokens": prompt - known,
        "device_computed": drafter.prompt_computed,
        "written_tokens": len(text.tokens),
        "first_token_ms": ((first_at or time.monotonic()) - asked) * 1e3,
    }


def _alike(codec: GgufModel, devices: int, tokens: int) -> list[list[int]]:
    """Return prompts that begin with the same rules, each with its own question."""
    if not devices:
        return []
    system = ChatMessage("system", rules(lambda text: len(codec.encode(text)), tokens=tokens))
    asked = [f"Report {number}: {QUESTIONS[number % len(QUESTIONS)]}" for number in range(devices)]
    return [chat_prompt(codec, [system, ChatMessage("user", text)]).tokens for text in asked]


def _write_together(bench: Bench, port: int, codec: GgufModel, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Complete all prompts at the same moment, edge-only; return the sessions' ids in the log."""
    drafters = [NoDrafter(codec.vocabulary, codec, context=1 << 17) for _ in prompts]
    with connected(port, bench.fleet, drafters, name="sharing") as agents:
        calls = [
            lambda n=n, agent=agent: agent.generate(
                GenerateRequest(tuple(prompts[n]), policy=SamplingPolicy(seed=n), max_new_tokens=_FEW)
            )
            for n, agent in enumerate(agents)
        ]
        return [done.session.hex() for done in together(calls)]
