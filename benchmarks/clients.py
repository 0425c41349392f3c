"""Clients: which features of OpenAI's API work with the client libraries that applications use (yes, or why not).

Each library is installed in an environment of its own in the folder `--tools`, in its current release, and calls a real
device with a real edge: a chat, synchronous, asynchronous and streamed; an object of a given class; a tool that is
called and whose result is returned. Takes two minutes after the installation.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Final

from benchmarks import client_calls
from benchmarks.harness import MODELS, Bench, Report, say, table
from benchmarks.processes import call, venv

LIBRARIES: Final = {
    "openai": "openai",
    "langchain-openai": "langchain",
    "llama-index-llms-openai-like": "llama_index",
    "litellm": "litellm",
}
"""Packages, and the names of their calls."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), metavar="LIBRARY")
    parser.add_argument("--tools", type=Path, default=MODELS.parent / "tools", help="(default: %(default)s)")


def run(bench: Bench) -> Report:
    programs = {name: venv(bench.options.tools.resolve() / f"client-{name}", name) for name in bench.options.only}
    rows: list[dict[str, Any]] = []
    wrong = []
    with (
        bench.broker() as broker,
        bench.edge(broker.port, bench.target(), engine="blocks"),
        bench.device(broker.port, context=2048) as device,
    ):
        for package, folder in programs.items():
            say(package)
            version = f"import importlib.metadata as m; print(m.version({package!r}))"
            found = call(folder / "python", "-c", version).strip()
            results = json.loads(
                call(folder / "python", client_calls.__file__, LIBRARIES[package], device.url).splitlines()[-1]
            )
            rows.append({"library": package, "version": found, **{name: not why for name, why in results.items()}})
            wrong += [f"{package}, {name}: {why}" for name, why in results.items() if why]
    said = [{**row, **{name: "yes" if row[name] else "no" for name in client_calls.FEATURES}} for row in rows]
    table(said, dict.fromkeys(("library", "version", *client_calls.FEATURES), ""))
    return Report(rows, wrong=wrong)
