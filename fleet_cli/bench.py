"""`fleet bench …`: the programs of `fleet_bench`, by name."""

import importlib
from typing import Final

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

_BENCHMARKS: Final = {
    "batching": "Verify one device and eight together: committed tokens for each second of edge compute.",
    "bytes": "Count what each system sends for a token of text: payload, packets, TLS, TCP/IP.",
    "capacity": "Write for 1 to 64 devices, by this system and others: tokens per second, clients at a service level.",
    "clients": "Have several clients ask one device for texts at once: tokens of each, and how soon a text begins.",
    "conversation": "Talk for ten turns, begin alike on 32 devices: tokens computed at both ends, time to the first.",
    "device-memory": "Ask a device a thousand times: its memory beside its model's file.",
    "engines": "Time a step of each verifier beside the raw engine under it: llama.cpp, or matrix products.",
    "faults": "Kill, stop, cut off and fill up what there is while devices write: are texts and log right, how soon?",
    "exactness": "Prove through a real mosquitto that texts follow the target's law, and that faults are caught.",
    "fenced": "What the messages of a device that is shut out cost the edge, by thread, beside a bare reader.",
    "hostile": "Attack a fleet as one of its own devices: what the honest ones keep, what the edge and its log bear.",
    "latency": "Write for one device over lines of any length and width, by this system and others: tokens per second.",
    "log": "Ask a session log of a million sessions all that is asked of one; export it; purge it beside a writer.",
    "memory": "Let an edge write thousands of short texts: its memory beside its weights and its budget.",
    "observability": "Write with log, metrics and dashboard, and without: tokens per second.",
    "offline": "Pull the edge away in mid-answer, under each policy: how soon texts go on or fail, and what is logged.",
    "overhead": "Measure what an edge costs beside its model: time of a verdict, verdicts a second, where time goes.",
    "overlap": "Let the edge write for 16 and 64 devices: for which share of the time its engine computes nothing.",
    "pacing": "Write under fixed plans and under chosen ones, near the edge and far from it: tokens per second.",
    "padding": "Measure what message sizes and times tell an observer, and what padding costs.",
    "paper": "Redraw the comparisons of arXiv 2507.12000, and hold the mistakes of its code against the law.",
    "remote": "Hold an edge over vLLM or SGLang against what the server writes by itself, and time its steps.",
    "reconnect": "Let a fleet lose its broker: how soon it is found again, and what finds it at once.",
    "round-trip": "Time a QoS 1 echo through mosquitto, with and without TCP_NODELAY.",
    "steering": "Set and command a fleet of 100 devices: how soon all have it and say so.",
    "structured": "Texts of ten JSON schemas beside free ones: do all validate, and what do forced tokens bring?",
    "streaming": "Let the edge write by itself for 1 to 16 devices, beside raw llama.cpp: tokens per second.",
    "suffix": "Write reports of one form, and texts that do not repeat, with and without drafts from earlier text.",
    "tls-cost": "Bytes and round trip of a round over mutual TLS, beside plain TCP.",
    "verifier-step": "Time the packed verifier's step beside its bound and plain decoding.",
}


def _add(name: str, summary: str) -> None:
    # Each script parses its own arguments, so that it can be run without this command too.
    @app.command(
        name,
        help=summary,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def run(context: typer.Context) -> None:
        module = importlib.import_module(f"fleet_bench.{name.replace('-', '_')}")
        raise typer.Exit(module.main(context.args))


for _name, _summary in _BENCHMARKS.items():
    _add(_name, _summary)
