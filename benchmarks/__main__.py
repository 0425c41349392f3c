"""Benchmarks and proofs of what the project claims: `python -m benchmarks NAME [OPTION …]`, run from a checkout.

`make bench` sets up all that they need, once. Each suite has `--help`.
"""

import importlib
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

__all__ = ["SUITES", "main"]

SUITES: Final = {
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

_PACKAGES: Final = ("torch", "llama_cpp", "psutil", "scipy", "jsonschema", "matplotlib", "pytest", "hypothesis")
_SET_UP: Final = "make bench"
_MODELS: Final = Path("models")
_COSTS: Final = {"latency": (8,)}
"""Targets of several times the demo's cost that a suite measures by default."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite, or list them; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in {"-h", "--help"}:
        print(__doc__.strip() if __doc__ else "", end="\n\n")
        for name, summary in SUITES.items():
            print(f"  {name:15} {summary}")
        return 0
    name, *options = words
    if name not in SUITES:
        print(f"There is no benchmark {name!r}; there are: {', '.join(SUITES)}.", file=sys.stderr)
        return 2
    if missing := [package for package in _PACKAGES if importlib.util.find_spec(package) is None]:
        print(f"The benchmarks need {', '.join(missing)}: run `{_SET_UP}` once, which sets it up.", file=sys.stderr)
        return 2
    if not {"-h", "--help"} & set(options) and "--models" not in options:
        _prepare_models(_COSTS.get(name, ()))
    module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
    code: int = module.main(options)
    return code


def _prepare_models(costs: Sequence[int]) -> None:
    """Make the models that are missing, with progress on standard error."""
    from rich.console import Console  # noqa: PLC0415 - a list of the suites needs none of it

    from fleet_cli.models.prepare import prepare, steps_of  # noqa: PLC0415
    from fleet_cli.models.progress import reporter  # noqa: PLC0415
    from fleet_cli.models.source import SMOLLM2, locate  # noqa: PLC0415

    source = locate(SMOLLM2)
    with reporter(Console(stderr=True), clock=time.monotonic) as report:
        for cost in (1, *costs):
            prepare(_MODELS / SMOLLM2.name, source, steps_of(SMOLLM2, source, cost=cost), report=report)


if __name__ == "__main__":
    sys.exit(main())
