"""`fleet device run | generate | selftest`."""

import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fleet_cli.errors import CommandError
from fleet_device.agent import Generation
from fleet_device.chat import ChatMessage, encode_chat
from fleet_device.service import DeviceService, load_drafter
from fleet_device.settings import DeviceSettings
from fleet_device.text import TextStream
from fleet_link.configuration import load_settings

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Config = Annotated[Path | None, typer.Option(help="TOML file.", envvar="FLEET_DEVICE_CONFIG")]
Fleet = Annotated[str | None, typer.Option(help="Fleet's name.")]
Device = Annotated[str | None, typer.Option(help="This device's name.")]
Host = Annotated[str | None, typer.Option(help="Broker's host.")]
Port = Annotated[int | None, typer.Option(help="Broker's port.")]
Model = Annotated[str | None, typer.Option(help="Draft model: prepared name, GGUF file, or repo:file.")]


@app.command("generate")
def generate_command(
    prompt: Annotated[str, typer.Argument(help="What to write about; `-` reads standard input.")],
    config: Config = None,
    fleet: Fleet = None,
    device: Device = None,
    host: Host = None,
    port: Port = None,
    model: Model = None,
    models_dir: Annotated[Path | None, typer.Option(help="Folder of the prepared models.")] = None,
    drafter: Annotated[str | None, typer.Option(help="llama.cpp or prompt-lookup.")] = None,
    mode: Annotated[str | None, typer.Option(help="residual or coupled.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1 keeps all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same decisions.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to write.")] = None,
    draft_length: Annotated[int | None, typer.Option(help="Tokens in a draft.")] = None,
    ahead: Annotated[bool | None, typer.Option(help="Draft ahead of the verdict.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of llama.cpp.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompt as it is.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
    events: Annotated[bool, typer.Option("--events", hidden=True, help="One JSON object a line as it goes.")] = False,
) -> None:
    """Write one text and leave."""
    settings = load_settings(
        DeviceSettings,
        config=config,
        flags={
            "fleet": fleet,
            "device": device,
            "broker": {"host": host, "port": port},
            "model": model,
            "models": models_dir,
            "drafter": drafter,
            "mode": mode,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
            "max_new_tokens": max_new_tokens,
            "draft_length": draft_length,
            "ahead": ahead,
            "threads": threads,
        },
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    with DeviceService(settings, load_drafter(settings)) as service:
        codec = service.drafter.codec
        ids = codec.encode(text) if raw else encode_chat(codec, [ChatMessage("user", text)])
        stream, pieces = TextStream(codec), []
        policy = settings.policy()
        if events:
            _emit({"event": "start", "prompt_tokens": len(ids), "seed": policy.seed})

        def on_tokens(tokens: Sequence[int]) -> None:
            piece = stream.feed(tokens)
            pieces.append(piece)
            if events:
                _emit({"event": "tokens", "number": len(tokens), "text": piece})
            elif not as_json:
                print(piece, end="", flush=True)

        generation = service.agent.generate(
            ids, policy=policy, max_new_tokens=settings.max_new_tokens, on_tokens=on_tokens
        )
        pieces.append(stream.finish())
        service.record(generation)
        vocabulary = service.drafter.vocabulary.size
    result = _result(settings.device, vocabulary, len(ids), policy.seed, generation, "".join(pieces))
    if events:
        _emit({"event": "end", **result})
    elif as_json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
    else:
        print(pieces[-1])
        print(_summary(result), file=sys.stderr)


def _result(  # noqa: PLR0917
    device: str, vocabulary: int, prompt_tokens: int, seed: int, generation: Generation, text: str
) -> dict[str, Any]:
    counters, closed = generation.counters, generation.closed
    tokens = len(generation.tokens)
    return {
        "device": device,
        "session": generation.session.hex(),
        "seed": seed,
        "vocabulary": vocabulary,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "finish": generation.reason.value,
        "wall_s": generation.wall_ms / 1e3,
        "first_token_s": None if generation.first_ms is None else generation.first_ms / 1e3,
        "tokens_per_s": tokens / (generation.wall_ms / 1e3) if generation.wall_ms else 0.0,
        "acceptance": counters.acceptance,
        "rounds": counters.rounds,
        "drafted": counters.drafted,
        "tested": counters.tested,
        "accepted": counters.accepted,
        "uplink_bytes": counters.uplink_bytes,
        "downlink_bytes": counters.downlink_bytes,
        "draft_ms": counters.draft_ms,
        "wait_ms": counters.wait_ms,
        "mean_batch": closed.mean_batch if closed else None,
        "edge_queue_ms": closed.queue_ms if closed else None,
        "edge_compute_ms": closed.compute_ms if closed else None,
        "resumes": generation.resumes,
        "text": text,
    }


def _summary(result: dict[str, Any]) -> str:
    acceptance = "–" if result["acceptance"] is None else f"{result['acceptance']:.2f}"
    return (
        f"[{result['tokens']} tokens, {result['tokens_per_s']:.1f} tokens/s, acceptance {acceptance}, "
        f"{result['rounds']} rounds, {result['uplink_bytes']} bytes up, {result['downlink_bytes']} down, "
        f"ended by {result['finish']}, session {result['session']}]"
    )


def _emit(event: dict[str, Any]) -> None:
    print(json.dumps(event, ensure_ascii=False), flush=True)
