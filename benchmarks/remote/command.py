"""Remote benchmark: an edge over inference servers that run, vLLM or SGLang, beside what the servers do by themselves.

Exactness: greedy texts through broker, edge and devices are the server's own, token by token; texts of two tokens
follow the law of the server's log-probabilities (chi-square), in both modes; and how many coupled texts repeat when
they are written with others. Then the time of a step beside llama.cpp in this process, in one run on one machine.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.remote.checks import check_greedy, check_repeats, check_sampled
from benchmarks.remote.fleet import Servers, running_fleet
from benchmarks.remote.oracle import Oracle
from benchmarks.remote.steps import time_steps
from benchmarks.shared.conditions import conditions
from benchmarks.shared.ending import ending_cleanly
from fleet_cli.demo.prompts import PROMPTS
from fleet_device.drafters.gguf import GgufModel
from fleet_device.texts.chat import ChatMessage, encode_chat
from fleet_edge.settings import EdgeSettings, RemoteSettings
from fleet_edge.verifiers.contract import RunsElsewhere, Verifier
from fleet_edge.verifiers.registry import load_verifier
from fleet_edge.verifiers.remote.client import ApiKey
from fleet_edge.verifiers.remote.tokenizer import load_local
from fleet_edge.verifiers.remote.verifier import endpoint_urls
from schemas.policy import Mode

__all__ = ["main"]

_MODELS = Path("models/smollm2-135m")


def main(argv: Sequence[str] | None = None) -> int:
    """Check and time; return 0 if texts are exactly the servers'."""
    arguments = _parse(argv)
    logging.getLogger("fleet_device.client.waiting").setLevel(logging.ERROR)  # a slow server is measured, not told of
    servers = Servers(
        endpoints=arguments.endpoints,
        api=arguments.api,
        target=arguments.target,
        top=arguments.top_logprobs,
        key_file=arguments.api_key_file,
        request_s=arguments.request_s,
    )
    report: dict[str, Any] = conditions("llama-cpp-python", "httpx", broker=True)
    exact = True
    with ending_cleanly():
        if arguments.texts:
            exact = _check(servers, arguments, report)
        if arguments.repeats:
            _time(servers, arguments, report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if exact else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks remote", description=__doc__)
    parser.add_argument("--endpoints", required=True, help="addresses of the servers, with commas between them")
    parser.add_argument("--api", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--api-key-file", type=Path)
    parser.add_argument("--target", type=Path, default=_MODELS / "target", help="folder or GGUF with the tokenizer")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="that the servers compute in"
    )
    parser.add_argument("--draft", type=Path, default=_MODELS / "Q4_0.gguf", help="the devices' model")
    parser.add_argument("--gguf", type=Path, default=_MODELS / "target-Q8_0.gguf", help="for llama.cpp, beside")
    parser.add_argument("--top-logprobs", type=int, default=50)
    parser.add_argument("--request-s", type=float, default=60.0, help="longest wait for an answer, in seconds")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--texts", type=int, default=600, help="sampled ones of each mode; 0 checks nothing")
    parser.add_argument("--length", type=int, default=48, help="of the other texts, in tokens")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="in a timed step")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 5], metavar="N", help="of each in a timed step")
    parser.add_argument("--context", type=int, default=256, help="tokens computed before a timed step")
    parser.add_argument("--repeats", type=int, default=12, help="of a timed step; 0 times nothing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def _check(servers: Servers, arguments: argparse.Namespace, report: dict[str, Any]) -> bool:
    local = load_local(str(servers.target))
    codec = GgufModel(arguments.draft, vocabulary_only=True)
    prompts = [encode_chat(codec, [ChatMessage("user", text)]) for text in PROMPTS]
    story = codec.encode("Once upon a time there was a")
    codec.close()
    oracle = Oracle(
        endpoint_urls(servers.endpoints)[0],
        servers.api,
        headers=ApiKey(servers.key_file).headers,
        vocabulary=len(local.strings),
    )
    with (
        tempfile.TemporaryDirectory(prefix="remote-") as folder,
        running_fleet(
            servers, arguments.draft, devices=arguments.devices, draft_length=4, folder=Path(folder)
        ) as devices,
    ):
        greedy = check_greedy(
            devices, oracle, prompts, length=arguments.length, dtype=arguments.dtype, ends=local.end_tokens
        )
        gaps = ", ".join(f"{gap:.2g}" for gap in greedy.gaps)
        print(
            f"{_mark(greedy.passed)} greedy: {greedy.equal} of {greedy.texts} texts of up to {arguments.length} tokens "
            f"are the server's own; acceptance {greedy.acceptance:.2f}"
            + (f"; where the others part, its two best tokens lie {gaps} apart" if gaps else ""),
            flush=True,
        )
        report["greedy"] = asdict(greedy)
        exact = greedy.passed
        report["sampled"] = []
        for mode in Mode:
            sampled = check_sampled(
                devices,
                oracle,
                story,
                mode=mode,
                texts=arguments.texts,
                top=arguments.top_logprobs,
                ends=local.end_tokens,
            )
            print(
                f"{_mark(sampled.passed)} {mode.value}: {sampled.texts} texts of two tokens against the server's "
                f"log-probabilities, {sampled.outcomes} outcomes: chi-square p {sampled.p:.3g}; "
                f"acceptance {sampled.acceptance:.2f}",
                flush=True,
            )
            report["sampled"].append(asdict(sampled))
            exact = exact and sampled.passed
        repeats = check_repeats(devices, prompts, length=arguments.length, top=arguments.top_logprobs)
        print(
            f"    coupled texts written alone, then with others: {repeats.equal} of {repeats.texts} repeat; "
            f"{repeats.common} of {repeats.tokens} tokens before the first difference",
            flush=True,
        )
        report["repeats"] = asdict(repeats)
    oracle.close()
    return exact


def _time(servers: Servers, arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    remote = RemoteSettings.model_validate(
        {
            "endpoints": servers.endpoints,
            "api": servers.api,
            "api_key_file": servers.key_file,
            "top_logprobs": servers.top,
            "request_s": servers.request_s,
            "step_s": 2 * servers.request_s,
        }
    )
    verifiers: dict[str, Verifier] = {
        servers.api: load_verifier(EdgeSettings(engine="remote", target=str(servers.target), remote=remote)),
        "llama.cpp": load_verifier(EdgeSettings(engine="llama.cpp", target=str(arguments.gguf))),
    }
    for verifier in verifiers.values():
        print(f"{verifier.info.name}: {verifier.info.runs_on}")
    found = time_steps(
        verifiers,
        sequences=arguments.sessions,
        tokens=arguments.tokens,
        context=arguments.context,
        repeats=arguments.repeats,
    )
    print(f"{'sessions':>8} {'tokens':>6} {'context':>7} {'engine':>10} {'ms':>8} {'best ms':>8}")
    for step in found:
        print(
            f"{step.sequences:8} {step.tokens:6} {step.context:7} {step.engine:>10} {step.ms:8.1f} {step.best_ms:8.1f}"
        )
    report["steps"] = [asdict(step) for step in found]
    for verifier in verifiers.values():
        if isinstance(verifier, RunsElsewhere):
            verifier.shut_down()


def _mark(passed: bool) -> str:
    return "ok " if passed else "BAD"
