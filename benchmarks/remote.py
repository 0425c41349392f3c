"""Remote: an edge over inference servers (vLLM) that run, next to what the servers do without it.

Exactness: greedy texts through broker, edge and devices are the server's own, token by token; texts of two tokens
follow the distribution of the server's log-probabilities (chi-square), in both modes. Then the time of a step (ms)
next to llama.cpp in this process. Start a server first (docs/engines.md). Takes 11 minutes.
"""

import argparse
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Final

import httpx
import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.steps import by_turns, fill, steps
from benchmarks.harness import MODELS, Bench, SuiteReport, connected, table, together
from fleet_admin.models.prompts import PROMPTS
from fleet_device.client.agent import Agent
from fleet_device.drafters.contract import common_prefix
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.drafters.model_file import GgufModel
from fleet_device.pacing.contract import FixedPacing
from fleet_device.requests.chat import chat_prompt
from fleet_device.requests.generate import GenerateRequest, Generation
from fleet_device.requests.structured import ChatMessage
from fleet_edge.settings import EdgeSettings, InferenceServerSettings
from fleet_edge.verifiers.contract import RunsElsewhere, VerifierError
from fleet_edge.verifiers.registry import load_verifier
from fleet_edge.verifiers.remote.local import endpoint_url, key_headers, load_local
from sampling.distribution import shape
from schemas.policy import Mode, SamplingPolicy
from tests.support.statistics import ALARM, p_value

_PREFIX: Final = "token_id:"


class Oracle:
    def __init__(self, url: str, *, headers: Mapping[str, str], vocabulary: int, timeout_s: float = 300.0) -> None:
        self._vocabulary = vocabulary
        self._http = httpx.Client(base_url=url, headers=dict(headers), timeout=timeout_s, trust_env=False)
        self._model = str(self._get("/v1/models")["data"][0]["id"])

    def close(self) -> None:
        self._http.close()

    def greedy(self, prompt: Sequence[int], length: int) -> tuple[int, ...]:
        """Have the server decode that many tokens greedily, in one request."""
        answer = self._complete([list(prompt)], max_tokens=length, top=0)
        return tuple(map(_token, answer["choices"][0]["logprobs"]["tokens"]))

    def row(self, prefix: Sequence[int], top: int) -> NDArray[np.float64]:
        """Return `[vocabulary]`: the log-probabilities after a prefix; of all but the `top` largest, minus infinity."""
        answer = self._complete([list(prefix)], max_tokens=1, top=top)
        (named,) = answer["choices"][0]["logprobs"]["top_logprobs"]
        entries = {_token(name): value for name, value in named.items()}
        row = np.full(self._vocabulary, -np.inf)
        for token, value in entries.items():
            row[token] = value
        return row

    def _complete(self, prompts: list[list[int]], *, max_tokens: int, top: int) -> Any:  # noqa: ANN401 - JSON
        body = {
            "model": self._model, "prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "logprobs": top, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        return self._post("/v1/completions", body)

    def _get(self, path: str) -> Any:  # noqa: ANN401 - JSON
        return self._json(lambda: self._http.get(path), path)

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON
        return self._json(lambda: self._http.post(path, json=body), path)

    def _json(self, send: Any, path: str) -> Any:  # noqa: ANN401 - JSON
        try:
            response = send()
            response.raise_for_status()
            return response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise VerifierError(
                f"The inference server at {self._http.base_url} cannot be asked {path}: {error}"
            ) from error


def _token(name: str) -> int:
    return int(name.removeprefix(_PREFIX))


_TIE: Final = {"float32": 1e-2, "bfloat16": 0.5}
_PAIR: Final = 2  # tokens of a sampled output: the second is verified in the same answer as the first


class RemoteDevices:
    """Connected devices; each drafts with a context of its own."""

    def __init__(self, agents: Sequence[Agent]) -> None:
        self._agents = agents

    def write(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """Complete all requests, as many at a time as there are devices."""
        done: dict[int, Generation] = {}
        queue, taking = iter(list(enumerate(requests))), Lock()

        def serve(agent: Agent) -> None:
            while True:
                with taking:
                    taken = next(queue, None)
                if taken is None:
                    return
                number, request = taken
                done[number] = agent.generate(request)

        together([partial(serve, agent) for agent in self._agents])
        return [done[number] for number in range(len(requests))]


@dataclass(frozen=True, slots=True)
class Greedy:
    """Greedy outputs, compared with the server's own.

    Attributes:
        equal: Number of outputs that are equal token by token.
        gaps: Of the others, the gap between the two best log-probabilities where they differ.
        acceptance: Accepted of tested draft tokens.
        tie: Largest gap of a tie, which the server's own rounding may decide in either way.
    """

    texts: int
    equal: int
    gaps: list[float]
    acceptance: float
    tie: float

    @property
    def passed(self) -> bool:
        return all(gap < self.tie for gap in self.gaps)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Outputs of two tokens, tested against the server's log-probabilities."""

    mode: Mode
    texts: int
    outcomes: int
    p: float
    acceptance: float

    @property
    def passed(self) -> bool:
        return self.p > ALARM


def check_greedy(
    devices: RemoteDevices,
    oracle: Oracle,
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    dtype: str,
    ends: Sequence[int],
) -> Greedy:
    """Decode greedily through the system, and have the server complete the same prompts."""
    policy = SamplingPolicy(temperature=0.0, seed=1)
    done = devices.write([GenerateRequest(tuple(prompt), policy, length) for prompt in prompts])
    gaps, equal = [], 0
    for prompt, text in zip(prompts, done, strict=True):
        own = _until_end(oracle.greedy(prompt, length), ends)
        if text.tokens == own:
            equal += 1
            continue
        at = common_prefix(text.tokens, own)
        best = np.sort(oracle.row([*prompt, *own[:at]], _PAIR))[-_PAIR:]
        gaps.append(float(best[1] - best[0]))
    return Greedy(len(done), equal, gaps, _acceptance(done), _TIE[dtype])


def check_sampled(
    devices: RemoteDevices,
    oracle: Oracle,
    prompt: Sequence[int],
    *,
    mode: Mode,
    texts: int,
    top: int,
    ends: Sequence[int],
) -> Sampled:
    """Generate many outputs of two tokens, and test them against the server's log-probabilities by chi-square."""
    policy = SamplingPolicy(mode=mode, temperature=0.9, top_k=min(20, top), top_p=0.95, seed=0)
    first = shape(oracle.row(prompt, top), policy)
    law: dict[tuple[int, int], float] = {}
    for token, p in zip(first.ids.tolist(), first.probs.tolist(), strict=True):
        if token in ends:
            law[token, token] = p
            continue
        second = shape(oracle.row([*prompt, token], top), policy)
        law |= {(token, then): p * q for then, q in zip(second.ids.tolist(), second.probs.tolist(), strict=True)}
    policies = [policy.model_copy(update={"seed": 1 + number}) for number in range(texts)]
    done = devices.write([GenerateRequest(tuple(prompt), each, _PAIR) for each in policies])
    places = {pair: at for at, pair in enumerate(law)}
    counts = np.zeros(len(places) + 1, dtype=np.int64)  # the last is what the law rules out
    for text in done:
        counts[places.get((text.tokens[0], text.tokens[-1]), len(places))] += 1
    expected = np.array([*law.values(), 0.0])
    return Sampled(mode, texts, len(law), p_value(counts, expected), _acceptance(done))


def _acceptance(done: Sequence[Any]) -> float:
    tested = sum(text.counters.tested for text in done)
    return float(sum(text.counters.accepted for text in done) / max(1, tested))


def _until_end(tokens: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """Return an output up to its end token, included."""
    for at, token in enumerate(tokens):
        if token in ends:
            return tuple(tokens[: at + 1])
    return tuple(tokens)


_CONTEXT: Final = 1024
_DRAFT: Final = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", required=True, help="address of the server")
    parser.add_argument("--api-key-file", type=Path)
    parser.add_argument("--target", type=Path, default=MODELS / "target", help="folder or GGUF with the tokenizer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the servers")
    parser.add_argument("--draft", type=Path, default=MODELS / "Q4_0.gguf", help="the devices' model")
    parser.add_argument("--gguf", type=Path, default=MODELS / "target-Q8_0.gguf", help="for llama.cpp")
    parser.add_argument("--top-logprobs", type=int, default=50)
    parser.add_argument("--request-s", type=float, default=60.0, help="longest wait for an answer, in seconds")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--outputs", type=int, default=600, help="sampled ones of each mode; 0 checks nothing")
    parser.add_argument("--length", type=int, default=48, help="of the other texts, in tokens")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="in a timed step")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 5], metavar="N", help="of each in a timed step")
    parser.add_argument("--context", type=int, default=256, help="tokens computed before a timed step")
    parser.add_argument("--repeats", type=int, default=12, help="of a timed step; 0 times nothing")


def run(bench: Bench) -> SuiteReport:
    logging.getLogger("fleet_device.client").setLevel(logging.ERROR)  # a slow server is measured, not reported
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    if bench.options.outputs:
        rows, wrong = _check(bench)
    timed = _time(bench) if bench.options.repeats else []
    return SuiteReport(rows, more={"steps": timed}, wrong=wrong)


def _check(bench: Bench) -> tuple[list[dict[str, Any]], list[str]]:
    options = bench.options
    local = load_local(str(options.target))
    with closing(GgufModel(options.draft, vocabulary_only=True)) as codec:
        prompts = [chat_prompt(codec, [ChatMessage("user", text)]).tokens for text in PROMPTS]
        story = codec.encode("Once upon a time there was a")
    url, headers = endpoint_url(options.endpoint), key_headers(options.api_key_file)
    oracle = Oracle(url, headers=headers, vocabulary=len(local.strings))
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
            sampled = check_sampled(devices, oracle, story, mode=mode, texts=options.outputs, top=top, ends=ends)
            rows.append({"check": mode.value, "passed": sampled.passed, **asdict(sampled)})
            print(
                f"{mode.value}: {sampled.texts} texts of two tokens, {sampled.outcomes} outcomes: chi-square p "
                f"{sampled.p:.3g}; acceptance {sampled.acceptance:.2f}",
                flush=True,
            )
    return rows, [f"{row['check']}: texts are NOT the server's." for row in rows if not row["passed"]]


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the edge's settings of its servers."""
    names = ("endpoint", "top_logprobs", "request_s", "api_key_file")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


@contextmanager
def _fleet(bench: Bench) -> Iterator[RemoteDevices]:
    options = bench.options
    with ExitStack() as stack:
        broker = stack.enter_context(bench.broker())
        stack.enter_context(bench.edge(broker.port, options.target, engine="remote", **_settings(options)))
        model = LlamaCppSettings(path=options.draft, threads=1, context=_CONTEXT)
        drafters = [stack.enter_context(closing(LlamaCppDrafter(model))) for _ in range(options.devices)]
        pacing = FixedPacing(_DRAFT)
        agents = stack.enter_context(connected(broker.port, bench.fleet, drafters, pacing=lambda: pacing))
        yield RemoteDevices(agents)


def _time(bench: Bench) -> list[dict[str, Any]]:
    options = bench.options
    remote = InferenceServerSettings.model_validate(_settings(options))
    server = load_verifier(EdgeSettings(engine="remote", target=str(options.target), remote=remote))
    local = load_verifier(EdgeSettings(engine="llama.cpp", target=str(options.gguf)))
    size = {"sequences": max(options.sessions), "context": options.context}
    ours, raw = (steps(verifier, fill(verifier, **size)) for verifier in (server, local))
    found = [
        asdict(by_turns(ours, [raw], sequences=number, tokens=new, seconds=0.0, fewest=options.repeats))
        for number, new in itertools.product(options.sessions, options.tokens)
    ]
    columns = {"sequences": "d", "tokens": "d", "ms": ".1f", "raw_ms": ".1f"}
    table(found, columns, title="a step of the server; raw is llama.cpp in this process")
    if isinstance(server, RunsElsewhere):
        server.shut_down()
    return found
