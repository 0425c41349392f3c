"""Clients benchmark: several clients ask one device for texts at the same time; who is written how much, and how soon.

A real edge, a real mosquitto, and a real device with its local API. Each client asks for one text after the other over
HTTP, as applications do. What is counted is what each has been written when the time is over, and how long each text
took to begin; one client alone is measured in the same run.
"""

import argparse
import http.client
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.conversation.questions import QUESTIONS
from benchmarks.shared.conditions import conditions
from benchmarks.shared.ending import ending_cleanly
from benchmarks.shared.processes import BenchError
from broker_config.broker import Broker
from broker_config.errors import BrokerError
from broker_config.processes.runner import MosquittoProcess
from fleet_device.api.server import HOST, listen
from fleet_device.drafters.contract import TextCodec
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.gateway import Asked, Gateway
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings
from fleet_link.settings import BrokerSettings
from schemas.errors import FleetError
from tests.support.edge_process import edge_process

__all__ = ["Client", "fairness", "main"]

FLEET: Final = "clients"
MOST_UNEQUAL: Final = 1.5
"""Tokens of the client that is written most, to those of the one that is written least."""

_CONTEXT: Final = 1024
_ONLINE_S: Final = 60.0
_BUSY: Final = 429
_AGAIN_S: Final = 0.5  # after a text that has failed


@dataclass(slots=True)
class Client:
    """What one client has been written.

    Attributes:
        tokens: In all, those of a text that the time has cut off included; by the draft model's own tokenizer.
        texts: Ended.
        first_ms: From asking to the first piece of text, for each text.
        turned_away: Requests that the queue had no room for.
        failed: Texts that failed.
    """

    tokens: int = 0
    texts: int = 0
    first_ms: list[float] = field(default_factory=list)
    turned_away: int = 0
    failed: int = 0


def fairness(clients: Sequence[Client]) -> float:
    """Return the tokens of the client that has most, over those of the one that has least; infinite if it has none."""
    least = min(client.tokens for client in clients)
    return max(client.tokens for client in clients) / least if least else float("inf")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return 0 if the clients were written alike, 1 if not, 2 on errors."""
    arguments = _read(argv)
    rows: list[dict[str, Any]] = []
    try:
        with ending_cleanly(), tempfile.TemporaryDirectory() as folder:
            for count in dict.fromkeys([1, arguments.clients]):
                rows.append(_measure(count, arguments, Path(folder)))
                _show(rows[-1])
    except (FleetError, BrokerError) as error:
        print(error, file=sys.stderr)
        return 2
    worst = max(row["max_min_tokens"] for row in rows)
    if worst > MOST_UNEQUAL:
        print(f"MISSED: a client was written {worst:.2f} times what another was, {MOST_UNEQUAL} allowed", flush=True)
    if arguments.json is not None:
        content = {
            **conditions("llama-cpp-python", "torch", "paho-mqtt", broker=True),
            "settings": {name: str(value) for name, value in vars(arguments).items() if name != "json"},
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 1 if worst > MOST_UNEQUAL else 0


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks clients", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--target", default="target-Q8_0.gguf", help="in that folder (default: %(default)s)")
    parser.add_argument("--draft", default="Q4_0", help="quantization of the draft model (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="at the same time (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=2, help="texts that the device writes at once")
    parser.add_argument("--tokens", type=int, default=16, help="of each text, at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args(argv)
    if min(arguments.clients, arguments.at_once, arguments.tokens) < 1 or arguments.seconds <= 0:
        parser.error("--clients, --at-once, --tokens and --seconds must be positive")
    return arguments


def _measure(count: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    with MosquittoProcess(Broker(fleet=FLEET)) as broker:
        edge = [
            "--fleet", FLEET, "--port", str(broker.port), "--target", str(arguments.models / arguments.target),
            "--engine", "llama.cpp", "--context", str(_CONTEXT), "--threads", "1",
            "--db", f"sqlite:///{folder}/log-{count}.sqlite3", "--spool", f"{folder}/spool-{count}",
        ]  # fmt: skip
        with edge_process(edge):
            settings = DeviceSettings(
                fleet=FLEET,
                broker=BrokerSettings(port=broker.port),
                context=_CONTEXT,
                texts_at_once=arguments.at_once,
                api_port=0,  # the benchmark serves a port of its own
                api_waiting=count,
                max_new_tokens=arguments.tokens,
            )
            draft = LlamaCppSettings(
                path=arguments.models / f"{arguments.draft}.gguf",
                threads=1,
                context=_CONTEXT,
                sequences=arguments.at_once,
            )
            clients, took_s = _write(settings, LlamaCppDrafter(draft), count, seconds=arguments.seconds)
    tokens = sum(client.tokens for client in clients)
    firsts = [each for client in clients for each in client.first_ms]
    return {
        "clients": count,
        "at_once": arguments.at_once,
        "tokens": [client.tokens for client in clients],
        "texts": [client.texts for client in clients],
        "turned_away": sum(client.turned_away for client in clients),
        "failed": sum(client.failed for client in clients),
        "max_min_tokens": fairness(clients),
        "tokens_per_s": tokens / took_s,
        "first_ms_median": median(firsts) if firsts else None,
        "first_ms_most": max(firsts, default=None),
    }


def _write(
    settings: DeviceSettings, drafter: LlamaCppDrafter, count: int, *, seconds: float
) -> tuple[list[Client], float]:
    service = DeviceService(settings, drafter)
    gateway = Gateway(service)
    sock = listen(0)
    port = sock.getsockname()[1]
    gateway.serve(sock)
    gateway.start()
    try:
        if not service.edges.wait_online(_ONLINE_S):
            raise BenchError("No edge was there within a minute.")
        clients, over = [Client() for _ in range(count)], threading.Event()
        threads = [
            threading.Thread(target=_ask, args=(client, port, number, over, drafter.codec), daemon=True)
            for number, client in enumerate(clients)
        ]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        over.wait(seconds)
        over.set()
        took_s = time.monotonic() - began
        counted = [
            Client(each.tokens, each.texts, list(each.first_ms), each.turned_away, each.failed) for each in clients
        ]
        gateway.ask(Asked.STOP)
    finally:
        gateway.stop()
    return counted, took_s


def _ask(client: Client, port: int, number: int, over: threading.Event, codec: TextCodec) -> None:
    """Ask for one text after the other, until the time is over."""
    turn = number
    while not over.is_set():
        connection = http.client.HTTPConnection(HOST, port, timeout=600.0)
        question = {"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]}
        body = {"messages": [question], "stream": True, "seed": turn}
        turn += 1
        asked = time.monotonic()
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status == _BUSY:
                client.turned_away += 1
                over.wait(float(answer.headers["Retry-After"]))
                continue
            if not _read_text(client, answer, over, codec, asked=asked):
                over.wait(_AGAIN_S)
        except (OSError, http.client.HTTPException):
            if not over.is_set():
                raise
        finally:
            connection.close()


def _read_text(
    client: Client, answer: http.client.HTTPResponse, over: threading.Event, codec: TextCodec, *, asked: float
) -> bool:
    """Count a text as it comes; return whether it has not failed."""
    first = True
    for line in answer:
        text = line.decode().removeprefix("data: ").strip()
        if over.is_set():
            return True
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


def _show(row: dict[str, Any]) -> None:
    first = "-" if row["first_ms_median"] is None else f"{row['first_ms_median']:.0f} ms"
    most = "-" if row["first_ms_most"] is None else f"{row['first_ms_most']:.0f} ms"
    print(
        f"{row['clients']} clients, {row['at_once']} texts at once: {row['tokens_per_s']:.1f} tokens/s in all, tokens "
        f"{min(row['tokens'])} to {max(row['tokens'])} each (max/min {row['max_min_tokens']:.2f}), first token after "
        f"{first} (median), {most} at most, {row['turned_away']} requests turned away, {row['failed']} texts failed",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
