"""Clients: how evenly a device serves several applications at once (tokens each, milliseconds to the first piece).

A real edge, a real mosquitto, and a real device with its local API. Each client asks for one text after the other over
HTTP, as applications do. Counted is what each has received when the time is over; one client alone is measured in the
same run. Takes 5 minutes.
"""

import argparse
import json
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

import httpx

from benchmarks.applications.conversation import QUESTIONS
from benchmarks.harness import Bench, Report, at_most, number_of, table
from fleet_device.drafters.contract import TextCodec
from fleet_device.drafters.model_file import GgufModel

_MOST_UNEQUAL: Final = 1.5
_CONTEXT: Final = 1024
_TIMEOUT_S: Final = 600.0
_AGAIN_S: Final = 0.5  # after a failed request


@dataclass(slots=True)
class _Client:
    """What one client has received; tokens by the draft model's tokenizer, including cut-off completions."""

    tokens: int = 0
    texts: int = 0
    first_ms: list[float] = field(default_factory=list)
    turned_away: int = 0
    failed: int = 0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft", default="Q4_0", help="quantization of the draft model (default: %(default)s)")
    parser.add_argument("--clients", type=number_of(int, 1), default=8, help="at the same time (default: %(default)s)")
    parser.add_argument("--at-once", type=number_of(int, 1), default=2, help="texts that the device writes at once")
    parser.add_argument("--tokens", type=number_of(int, 1), default=16, help="of each text, at most")
    parser.add_argument("--seconds", type=number_of(float, 0.1), default=120.0, help="of each measurement")


def run(bench: Bench) -> Report:
    rows = [_measure(bench, count) for count in dict.fromkeys([1, bench.options.clients])]
    columns = {"clients": "d", "tokens_per_s": ".1f", "least_tokens": "d", "most_tokens": "d", "max_over_min": ".2f"}
    table(rows, columns | {"first_ms_median": ".0f", "first_ms_most": ".0f", "turned_away": "d", "failed": "d"})
    worst = max(row["max_over_min"] for row in rows)
    return Report(rows, [at_most("tokens of the client with most over the one with least", worst, _MOST_UNEQUAL)])


def _measure(bench: Bench, count: int) -> dict[str, Any]:
    options = bench.options
    draft = bench.model(f"{options.draft}.gguf")
    with (
        bench.broker() as broker,
        bench.edge(broker.port, bench.target(), context=_CONTEXT, threads=1),
        bench.device(
            broker.port,
            model=draft,
            context=_CONTEXT,
            texts_at_once=options.at_once,
            api_waiting=count,
            max_new_tokens=options.tokens,
        ) as device,
        closing(GgufModel(draft, vocabulary_only=True)) as codec,
    ):
        clients, took_s = _write(device.url, codec, count, seconds=options.seconds)
    tokens = [client.tokens for client in clients]
    firsts = [each for client in clients for each in client.first_ms]
    return {
        "clients": count,
        "tokens": tokens,
        "least_tokens": min(tokens),
        "most_tokens": max(tokens),
        "max_over_min": max(tokens) / min(tokens) if min(tokens) else float("inf"),
        "tokens_per_s": sum(tokens) / took_s,
        "first_ms_median": median(firsts) if firsts else None,
        "first_ms_most": max(firsts, default=None),
        "turned_away": sum(client.turned_away for client in clients),
        "failed": sum(client.failed for client in clients),
    }


def _write(url: str, codec: TextCodec, count: int, *, seconds: float) -> tuple[list[_Client], float]:
    clients, over, began = [_Client() for _ in range(count)], threading.Event(), time.monotonic()
    threads = [
        threading.Thread(target=_ask, args=(client, url, number, over, codec)) for number, client in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    over.wait(seconds)
    over.set()
    took_s = time.monotonic() - began
    for thread in threads:
        thread.join()
    return clients, took_s


def _ask(client: _Client, url: str, number: int, over: threading.Event, codec: TextCodec) -> None:
    turn = number
    while not over.is_set():
        question = {"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]}
        body = {"model": "fleet", "messages": [question], "stream": True, "seed": turn}
        turn += 1
        asked = time.monotonic()
        with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=_TIMEOUT_S) as answer:
            if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
                client.turned_away += 1
                over.wait(float(answer.headers["Retry-After"]))
            elif not _read_text(client, answer, over, codec, asked=asked):
                over.wait(_AGAIN_S)


def _read_text(
    client: _Client, answer: httpx.Response, over: threading.Event, codec: TextCodec, *, asked: float
) -> bool:
    """Count a completion as it arrives; return whether it succeeded."""
    first = True
    for line in answer.iter_lines():
        if over.is_set():
            return True
        text = line.removeprefix("data: ")
        if not text.startswith("{"):
            continue
        chunk = json.loads(text)
        if "error" in chunk:
            client.failed += 1
            return False
        for piece in [choice["delta"].get("content") for choice in chunk["choices"]]:
            client.tokens += len(codec.encode(piece)) if piece else 0
            if piece and first:
                first = False
                client.first_ms.append((time.monotonic() - asked) * 1e3)
    client.texts += 1
    return True
