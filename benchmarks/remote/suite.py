"""Remote: an edge over inference servers that run, vLLM or SGLang, next to what the servers do without it.

Exactness: greedy texts through broker, edge and devices are the server's own, token by token; texts of two tokens
follow the distribution of the server's log-probabilities (chi-square), in both modes; and how many coupled texts
repeat when they are generated with others. Then the time of a step (ms) next to llama.cpp in this process. Takes 11
minutes; `scripts/remote_vllm.py` installs and starts a server first.
"""

import argparse
import logging
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import MODELS, Bench, Report, connected, table
from benchmarks.remote.checks import Devices, check_greedy, check_repeats, check_sampled
from benchmarks.remote.oracle import Oracle
from fleet_admin.models.prompts import PROMPTS
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.drafters.model_file import GgufModel
from fleet_device.pacing.contract import FixedPacing
from fleet_device.requests.chat import ChatMessage, encode_chat
from fleet_edge.settings import EdgeSettings, InferenceServerSettings
from fleet_edge.verifiers.contract import Item, RunsElsewhere, Verifier
from fleet_edge.verifiers.registry import load_verifier
from fleet_edge.verifiers.remote.loading import ServerKey, endpoint_urls, load_local
from schemas.policy import Mode

_CONTEXT: Final = 1024
_DRAFT: Final = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoints", required=True, help="addresses of the servers, with commas between them")
    parser.add_argument("--api", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--api-key-file", type=Path)
    parser.add_argument("--target", type=Path, default=MODELS / "target", help="folder or GGUF with the tokenizer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the servers")
    parser.add_argument("--draft", type=Path, default=MODELS / "Q4_0.gguf", help="the devices' model")
    parser.add_argument("--gguf", type=Path, default=MODELS / "target-Q8_0.gguf", help="for llama.cpp")
    parser.add_argument("--top-logprobs", type=int, default=50)
    parser.add_argument("--request-s", type=float, default=60.0, help="longest wait for an answer, in seconds")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--texts", type=int, default=600, help="sampled ones of each mode; 0 checks nothing")
    parser.add_argument("--length", type=int, default=48, help="of the other texts, in tokens")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="in a timed step")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 5], metavar="N", help="of each in a timed step")
    parser.add_argument("--context", type=int, default=256, help="tokens computed before a timed step")
    parser.add_argument("--repeats", type=int, default=12, help="of a timed step; 0 times nothing")


def run(bench: Bench) -> Report:
    logging.getLogger("fleet_device.client").setLevel(logging.ERROR)  # a slow server is measured, not reported
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    if bench.options.texts:
        rows, wrong = _check(bench)
    steps = _time(bench) if bench.options.repeats else []
    return Report(rows, more={"steps": steps}, wrong=wrong)


def _check(bench: Bench) -> tuple[list[dict[str, Any]], list[str]]:
    options = bench.options
    local = load_local(str(options.target))
    with closing(GgufModel(options.draft, vocabulary_only=True)) as codec:
        prompts = [encode_chat(codec, [ChatMessage("user", text)]) for text in PROMPTS]
        story = codec.encode("Once upon a time there was a")
    url, headers = endpoint_urls(options.endpoints)[0], ServerKey(options.api_key_file).headers
    oracle = Oracle(url, options.api, headers=headers, vocabulary=len(local.strings))
    ends, top = local.end_tokens, options.top_logprobs
    with closing(oracle), _fleet(bench) as devices:
        greedy = check_greedy(devices, oracle, prompts, length=options.length, dtype=options.dtype, ends=ends)
        rows = [{"check": "greedy", "passed": greedy.passed, **asdict(greedy)}]
        gaps = ", ".join(f"{gap:.2g}" for gap in greedy.gaps)
        print(
            f"greedy: {greedy.equal} of {greedy.texts} texts of up to {options.length} tokens are the server's own; "
            f"acceptance {greedy.acceptance:.2f}{f'; log-probabilities apart where others part: {gaps}' * bool(gaps)}",
            flush=True,
        )
        for mode in Mode:
            sampled = check_sampled(devices, oracle, story, mode=mode, texts=options.texts, top=top, ends=ends)
            rows.append({"check": mode.value, "passed": sampled.passed, **asdict(sampled)})
            print(
                f"{mode.value}: {sampled.texts} texts of two tokens, {sampled.outcomes} outcomes: chi-square p "
                f"{sampled.p:.3g}; acceptance {sampled.acceptance:.2f}",
                flush=True,
            )
        repeats = check_repeats(devices, prompts, length=options.length, top=top)
        rows.append({"check": "repeats", "passed": True, **asdict(repeats)})
        print(
            f"coupled texts alone, then with others: {repeats.equal} of {repeats.texts} repeat; {repeats.common} of "
            f"{repeats.tokens} tokens before the first difference",
            flush=True,
        )
    return rows, [f"{row['check']}: texts are NOT the server's." for row in rows if not row["passed"]]


@contextmanager
def _fleet(bench: Bench) -> Iterator[Devices]:
    options = bench.options
    settings = {
        "api": options.api,
        "endpoints": options.endpoints,
        "top_logprobs": options.top_logprobs,
        "request_s": options.request_s,
        "step_s": 2 * options.request_s,
        **({} if options.api_key_file is None else {"api_key_file": options.api_key_file}),
    }
    with ExitStack() as stack:
        broker = stack.enter_context(bench.broker())
        stack.enter_context(bench.edge(broker.port, options.target, engine="remote", **settings))
        model = LlamaCppSettings(path=options.draft, threads=1, context=_CONTEXT)
        drafters = [stack.enter_context(closing(LlamaCppDrafter(model))) for _ in range(options.devices)]
        pacing = FixedPacing(_DRAFT)
        agents = stack.enter_context(connected(broker.port, bench.fleet, drafters, pacing=lambda: pacing))
        yield Devices(agents)


def _time(bench: Bench) -> list[dict[str, Any]]:
    options = bench.options
    remote = InferenceServerSettings.model_validate(
        {
            "endpoints": options.endpoints,
            "api": options.api,
            "api_key_file": options.api_key_file,
            "top_logprobs": options.top_logprobs,
            "request_s": options.request_s,
            "step_s": 2 * options.request_s,
        }
    )
    verifiers: dict[str, Verifier] = {
        options.api: load_verifier(EdgeSettings(engine="remote", target=str(options.target), remote=remote)),
        "llama.cpp": load_verifier(EdgeSettings(engine="llama.cpp", target=str(options.gguf))),
    }
    sizes = {"sequences": options.sessions, "tokens": options.tokens, "context": options.context}
    found = time_steps(verifiers, **sizes, repeats=options.repeats)
    table(found, {"engine": "", "sequences": "d", "tokens": "d", "context": "d", "ms": ".1f", "best_ms": ".1f"})
    for verifier in verifiers.values():
        if isinstance(verifier, RunsElsewhere):
            verifier.shut_down()
    return found


_WARM_UP = 2


def time_steps(
    verifiers: Mapping[str, Verifier],
    *,
    sequences: Sequence[int],
    tokens: Sequence[int],
    context: int,
    repeats: int,
    seed: int = 1,
) -> list[dict[str, Any]]:
    """Time steps of several engines, in turns: each size with all engines before the next size.

    New tokens are drawn for every repeat, so that a server has nothing of them in its prefix cache.

    Args:
        verifiers: By name; none has an open sequence.
        sequences: Sizes of a step.
        tokens: New tokens of a sequence, each of whose rows is wanted.
        context: Tokens of a sequence that are computed before.
        repeats: Timed steps of each size.
        seed: Of the tokens.
    """
    rng = random.Random(seed)
    vocabulary = range(min(verifier.info.vocabulary.size for verifier in verifiers.values()))
    found = []
    for number in sequences:
        for verifier in verifiers.values():
            for key in range(number):
                verifier.open(key)
                verifier.score([Item(key, rng.choices(vocabulary, k=context), 1)])
        for new in tokens:
            for name, verifier in verifiers.items():
                steps = [
                    [Item(key, rng.choices(vocabulary, k=new), new) for key in range(number)]
                    for _ in range(_WARM_UP + repeats)
                ]
                times = [_time_step(verifier, items, back_to=context) for items in steps][_WARM_UP:]
                size = {"engine": name, "sequences": number, "tokens": new, "context": context}
                found.append({**size, "ms": statistics.median(times), "best_ms": min(times)})
        for verifier in verifiers.values():
            for key in range(number):
                verifier.close(key)
    return found


def _time_step(verifier: Verifier, items: Sequence[Item], *, back_to: int) -> float:
    """Return the milliseconds of one step, which is taken back afterwards."""
    started = time.perf_counter()
    verifier.score(items)
    taken = 1e3 * (time.perf_counter() - started)
    for item in items:
        verifier.truncate(item.sequence, back_to)
    return taken
