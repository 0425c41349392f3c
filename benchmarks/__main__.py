"""Benchmarks and proofs of what the project claims: `python -m benchmarks NAME [PART] [OPTION …]`, from a checkout.

`make bench ARGS="NAME …"` does the same, and before that sets up what they need, once. `--help` after a NAME says what
a suite compares, in which units, and how long it takes. A suite of several parts runs all of them if none is named.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

SUITES: Final[dict[str, tuple[str, str]]] = {
    "exactness system": (
        "exactness.system",
        "Texts through a real mosquitto follow the target.",
    ),
    "exactness power": (
        "exactness.power",
        "Small mistakes, and how often the proof finds them.",
    ),
    "bytes": ("bytes", "What each system sends for a token of text: payload, packets, TLS, TCP/IP."),
    "latency": ("latency", "Tokens per second of one device, over any line, by this system and others."),
    "capacity": ("capacity.suite", "Clients at a service level, and tokens per second of all, by system."),
    "schemas": ("schemas", "A collection of JSON schemas, asked of a device: valid, refused or wrong answers."),
    "tools": ("tools", "Calls of functions in cases of BFCL: those that parse, are valid, and are right."),
    "serving": ("serving", "Speed of a fleet and of llama.cpp's server, as the load generator guidellm sees it."),
    "large": ("large.suite", "A 7B target on this machine, devices of several speeds, and llama.cpp's server."),
    "restarts": ("large.restarts", "A 7B target: long prompts at once, and an edge that is killed."),
    "soak": ("large.soak", "A 7B target: long and short prompts of sixteen devices for half an hour; memory."),
    "pacing": ("pacing", "Tokens per second under plans that devices choose, and under fixed ones."),
    "engines steps": ("engines.steps", "A step of each verifier, over that of the raw engine under it."),
    "engines vocabulary": ("engines.vocabulary", "What 152,064 tokens cost at either end, next to the models."),
    "engines architectures": (
        "engines.architectures",
        "Random models of current architectures in each engine, against transformers.",
    ),
    "overhead verdicts": ("overhead.verdicts", "Time of a verdict, verdicts per second, processor time of each."),
    "applications conversation": ("applications.conversation", "Tokens that each turn computes, at both ends."),
    "applications structured": ("applications.structured", "Texts of ten JSON schemas: valid, and how fast."),
    "applications suffix": ("applications.suffix", "What drafts from earlier text bring."),
    "applications offline": ("applications.offline", "An edge is taken away in mid-answer, under each policy."),
    "faults moments": (
        "faults.moments",
        "What can fail does, at random moments: texts, log, time to go on.",
    ),
    "faults soak": ("faults.soak", "Fifty devices for half an hour, random faults: texts right, memory flat."),
    "hostile attacks": ("hostile.suite", "Attacks by one device of a fleet: what the honest ones keep."),
    "administration log": ("administration.log", "A session log of a million sessions: questions, export, purge."),
    "administration observability": ("administration.observability", "Tokens per second with log, metrics, dashboard."),
    "administration steering": ("administration.steering", "How soon 100 devices report a setting."),
    "remote": ("remote", "An edge over vLLM: exactly the server's texts, and how fast."),
}
"""Module and summary of each part of each suite."""

_PACKAGES: Final = ("torch", "llama_cpp", "psutil", "scipy", "jsonschema", "matplotlib", "pytest", "hypothesis")


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("FLEET_EDGE_KV_KEPT", "off")  # a run must not find what another has computed
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in {"-h", "--help"}:
        _list()
        return 0
    name, *options = words
    parts = [key for key in SUITES if key.partition(" ")[0] == name]
    if options and f"{name} {options[0]}" in parts:
        parts = [f"{name} {options.pop(0)}"]
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    complaint = None
    if not parts:
        complaint = f"There is no benchmark {name!r}; `python -m benchmarks` lists them."
    elif missing:
        complaint = (
            f"The benchmarks need {', '.join(missing)}: run it once as `make bench ARGS={name}`, which sets that up."
        )
    elif len(parts) > 1 and options:
        complaint = f"Name a part of it first: {', '.join(parts)}."
    if complaint is not None:
        print(complaint, file=sys.stderr)
        return 2
    return max(_run(part, options) for part in parts)


def _run(name: str, options: Sequence[str]) -> int:
    from benchmarks.harness import run_suite  # noqa: PLC0415 - only once all packages are known to be there
    from fleet_cli.options import end_as_interrupted  # noqa: PLC0415 - likewise

    end_as_interrupted()

    module: Any = importlib.import_module(f"benchmarks.{SUITES[name][0]}")
    return run_suite(name, module, options)


def _list() -> None:
    print(f"{(__doc__ or '').strip()}\n")
    for name, (_, summary) in SUITES.items():
        print(f"  {name:29}{summary}")


if __name__ == "__main__":
    sys.exit(main())
