"""`fleet device generate`: one text on the terminal."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fleet_cli.device.grammar import read_grammar
from fleet_cli.errors import CommandError, ExitCode
from fleet_cli.events_flag import with_events
from fleet_cli.settings_flags import with_settings
from fleet_common.logs import Event, EventStream
from fleet_device.device import Device
from fleet_device.requests.generate import GeneratedText
from fleet_device.session.sequence import TokenOrigin
from fleet_device.settings import DeviceSettings, OfflinePolicy
from schemas.policy import Grammar
from schemas.printable import json_text, printable
from schemas.reasons import EndReason

Show = Callable[..., None]  # told of an event and its fields

# Before saying that nobody is there; an edge's retained state comes with the connection.
_EDGE_S = 1.0
_TELLS_WAITS = "fleet_device.client.retry.waits"


@with_events(outlives_reader=False)
@with_settings(DeviceSettings)
def generate_command(
    prompt: Annotated[str, typer.Argument(help="What to write about; `-` reads standard input.")],
    settings: DeviceSettings,
    *,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompt as it is.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Say at the end how the text was written, and why so, on standard error.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
    json_schema: Annotated[Path | None, typer.Option(help="Write JSON of this schema: a file.")] = None,
    regex: Annotated[str | None, typer.Option(help="Write what this regular expression matches as a whole.")] = None,
    lark: Annotated[Path | None, typer.Option(help="Write what this Lark grammar allows: a file.")] = None,
    events: EventStream,
) -> None:
    """Write one text and leave. Ctrl-C ends it where it is."""
    if stop and not all(stop):
        raise CommandError("--stop is empty; give the string before which the text shall end.")
    grammar = read_grammar(json_schema=json_schema, regex=regex, lark=lark)
    asked = _read_prompt(prompt)
    show: Show = events.write if events else _silent if as_json else _print
    try:
        events.write(Event.LOADING, model=settings.model)
        text, vocabulary = _write(settings, asked, raw=raw, stop=tuple(stop or ()), grammar=grammar, show=show)
        result = _result(settings.device, vocabulary, text)
        if events:
            events.write(Event.END, **result)
        elif as_json:
            print(json_text(result, indent=2))
        else:
            print()
            print(_summary(result), file=sys.stderr)
            if stats:
                print(_stats(result), file=sys.stderr)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the text has had enough; Python must not try to write the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.READER_GONE) from None
    if text.reason is EndReason.CANCELLED:
        raise typer.Exit(ExitCode.INTERRUPTED)


def _write(
    settings: DeviceSettings, asked: str, *, raw: bool, stop: tuple[str, ...], grammar: Grammar | None, show: Show
) -> tuple[GeneratedText, int]:
    """Write the text; return it with the vocabulary's size."""
    with (
        Device(settings) as device,
        device.stream(asked, raw=raw, stop=stop, grammar=grammar) as stream,
        _interrupt(stream.cancel),
    ):
        stream.on_wait = lambda reason: show(Event.WAITING, reason=reason)
        logging.getLogger(_TELLS_WAITS).setLevel(logging.ERROR)  # `show` does so, or is told not to
        if settings.offline is OfflinePolicy.WAIT and not device.wait_for_edge(_EDGE_S):
            _say(f"No edge of fleet {settings.fleet!r} is online; waiting {settings.open_s:.0f} s for one …")
        request = stream.request()
        show(Event.START, prompt_tokens=len(request.prompt), seed=request.policy.seed)
        for piece in stream.pieces():
            show(Event.TOKENS, number=piece.tokens, text=piece.text)
        return stream.result(), device.drafter.vocabulary.size


@contextmanager
def _interrupt(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` at the first Ctrl-C; the second one is Python's own."""

    def handle(_signal: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        action()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _read_prompt(prompt: str) -> str:
    text = sys.stdin.buffer.read().decode("utf-8", "replace") if prompt == "-" else prompt
    if not text.strip():
        where = "Standard input" if prompt == "-" else "The prompt"
        raise CommandError(f"{where} is empty; give the text to write about.")
    return text


def _result(device: str, vocabulary: int, text: GeneratedText) -> dict[str, Any]:
    generation = text.generation
    counters, closed = generation.counters, generation.closed
    tokens, choice = len(generation.tokens), generation.choice
    return {
        "device": device,
        "session": generation.session.hex(),
        "seed": text.request.policy.seed,
        "vocabulary": vocabulary,
        "prompt_tokens": len(text.request.prompt),
        "tokens": tokens,
        "finish": text.reason.value,
        "wall_s": generation.wall_ms / 1e3,
        "first_token_s": None if generation.first_ms is None else generation.first_ms / 1e3,
        "tokens_per_s": tokens / (generation.wall_ms / 1e3) if generation.wall_ms else 0.0,
        "plan": choice and choice.plan,
        "plan_reason": choice and choice.reason,
        "verified": text.verified,
        "unverified": text.unverified,
        "streamed": counters.streamed,
        "forced": text.origins.count(TokenOrigin.FORCED),
        "acceptance": counters.acceptance,
        "rounds": counters.rounds,
        "mean_draft": generation.mean_draft,
        "drafted": counters.drafted,
        "tested": counters.tested,
        "accepted": counters.accepted,
        "suffix_drafted": counters.suffix_drafted,
        "suffix_tested": counters.suffix_tested,
        "suffix_accepted": counters.suffix_accepted,
        "uplink_bytes": counters.uplink_bytes,
        "downlink_bytes": counters.downlink_bytes,
        "draft_ms": counters.draft_ms,
        "wait_ms": counters.wait_ms,
        "mean_batch": closed.mean_batch if closed else None,
        "edge_queue_ms": closed.queue_ms if closed else None,
        "edge_compute_ms": closed.compute_ms if closed else None,
        "resumes": generation.resumes,
        "text": text.text,
    }


def _summary(result: dict[str, Any]) -> str:
    acceptance = "none" if result["acceptance"] is None else f"{result['acceptance']:.2f}"
    mean_draft = "" if result["mean_draft"] is None else f" of {result['mean_draft']:.1f} tokens"
    unverified = f"{result['unverified']} of them UNVERIFIED, " if result["unverified"] else ""
    return (
        f"[{result['tokens']} tokens, {unverified} {result['tokens_per_s']:.1f} tokens/s, acceptance {acceptance}, "
        f"{result['rounds']} rounds{mean_draft}, {result['uplink_bytes']} bytes up, {result['downlink_bytes']} down, "
        f"ended by {result['finish']}, session {result['session']}]"
    )


def _stats(result: dict[str, Any]) -> str:
    first_s = "none" if result["first_token_s"] is None else f"{result['first_token_s']:.2f} s"
    drafted = max(0, result["tokens"] - result["streamed"] - result["unverified"])
    return "\n".join(
        (
            f"  plan at the end   {result['plan']}: {result['plan_reason']}",
            f"  tokens            {result['streamed']} written by the edge alone, {drafted} by way of drafts",
            f"  unverified        {result['unverified']} tokens, written while no edge answered, or behind such",
            f"  drafted           {result['drafted']} tokens; {result['tested']} tested, {result['accepted']} accepted",
            f"  from earlier text {result['suffix_drafted']} of these; {result['suffix_tested']} tested, "  # noqa: ISC004
            f"{result['suffix_accepted']} accepted",
            f"  first token       after {first_s}",
            f"  draft model       {result['draft_ms']:.0f} ms; waiting {result['wait_ms']:.0f} ms",
        )
    )


def _print(_event: Event, *, text: str = "", reason: str | None = None, **_: object) -> None:
    if reason is not None:
        _say(f"Waiting: {reason}")
    # A program that reads the text gets it as it is.
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def _silent(_event: Event, *, reason: str | None = None, **_: object) -> None:
    """Print nothing until the end; why it is late goes elsewhere."""
    if reason is not None:
        _say(f"Waiting: {reason}")


def _say(sentence: str) -> None:
    print(printable(sentence), file=sys.stderr, flush=True)
