"""Architectures: each engine and a device's draft model on small random models, against transformers in float32.

SOURCES is the unpacked source distribution of llama-cpp-python, whose converter makes the GGUFs (that of ministral3
needs the package sentencepiece). For each of the architectures a model is made; each engine takes its folder and its
GGUF, as far as it takes such files, in a process of its own. Overlap Σ min(p, q), 1 is equal: of a whole text and of
two sequences in a step; after wrong tokens are taken back; of a fork in the middle. All texts are longer than the
sliding windows. The run is a greedy one with wrong drafts among right ones: the number of tokens that are those of
transformers. An engine may refuse a model in one sentence, and what that names must serve it. Takes ten minutes on two
cores.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.engines.random_models import ARCHITECTURES, GREEDY, converter_of
from benchmarks.harness import Bench, SuiteReport, say, table

_TIMEOUT_S: Final = 600.0
_ENGINES: Final = {
    "blocks": ("folder", "GGUF"), "torch": ("folder", "GGUF"), "llama.cpp": ("GGUF",), "draft": ("GGUF",)
}  # fmt: skip
"""What takes which files."""

_LEAST: Final = {"blocks": 0.9, "torch": 0.98, "llama.cpp": 0.98, "draft": 0.98}
"""Least overlap of a right model; `blocks` has weights and inputs of 8 bits."""

_LEAST_OF_MODEL: Final = {
    ("gpt-oss", "draft"): 0.85,
    ("qwen35", "blocks"): 0.77,
    ("qwen35moe", "blocks"): 0.54,
    ("qwen3next", "blocks"): 0.64,
}
"""llama.cpp rounds the borders of gpt-oss's YaRN: a draft may differ, since what it proposes is verified. Rounding to 8
bits grows in random layers with a delta rule: transformers overlaps with itself by 0.81, 0.57 and 0.66 if it rounds
like `blocks`, whose bits are the same on every processor."""

_MEASURES: Final = ("overlap", "cut", "fork")
_NAMED: Final = re.compile(r"set engine to ([a-z]+(?:\.cpp)?)")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", type=Path, metavar="SOURCES", help="unpacked source distribution")
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the models there, and use those that are")


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    converter = converter_of(options.sources.expanduser())
    folder = options.keep or bench.folder
    rows: list[dict[str, Any]] = []
    for name in options.only:
        say(name)
        for row in _of_one(name, folder / name, converter):
            rows.append(row)
            say(" ".join(filter(None, _shown(row).values())))
    table([_shown(row) for row in rows], dict.fromkeys(("model", "engine", "file", *_MEASURES, "run", "what"), ""))
    wrong = list(_wrong(rows))
    print("\n".join(["", *markdown(rows)]))
    return SuiteReport(rows, wrong=wrong)


def _of_one(name: str, folder: Path, converter: Path) -> Iterator[dict[str, Any]]:
    if not (folder / "rows.npz").is_file() or not (folder / "model.gguf").is_file():
        made = _python("benchmarks.engines.random_models", name, folder, converter)
        if isinstance(made, str):
            yield {"model": name, "engine": "-", "file": "-", "failed": made}
    for engine, files in _ENGINES.items():
        for file in files:
            source = folder if file == "folder" else folder / "model.gguf"
            if not (folder / "rows.npz").is_file() or not source.exists():
                continue
            found = _python("benchmarks.engines.tried_model", engine, source, folder / "rows.npz")
            row = {"failed": found} if isinstance(found, str) else found
            yield {"model": name, "engine": engine, "file": file, **row}


def _python(module: str, *words: object) -> dict[str, Any] | str:
    """Return what a program prints as JSON, an empty record without output, or its last words if it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"It took more than {_TIMEOUT_S:g} s."
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"It ended with {done.returncode}."])[-1]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout.strip() else {}
    return found


def is_right(row: Mapping[str, Any]) -> bool:
    values: list[float] = [row[measure] for measure in _MEASURES if row.get(measure) is not None]
    own = _LEAST_OF_MODEL.get((row["model"], row["engine"]))
    least = _LEAST[row["engine"]] if own is None else own
    return min(values) >= least and (row["engine"] == "blocks" or own is not None or bool(row["run"] == GREEDY))


def _wrong(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    serves = {(row["model"], row["engine"]) for row in rows if "overlap" in row}
    for row in rows:
        where = f"{row['model']}, {row['engine']}, {row['file']}"
        if "failed" in row:
            yield f"{where}: failed: {row['failed']}"
        elif "refused" in row:
            for engine in _NAMED.findall(row["refused"]):
                named = _ENGINES if engine == "auto" else (engine,)
                if not any((row["model"], each) in serves for each in named):
                    yield f"{where}: the refusal names {engine}, which refuses too: {row['refused']}"
        elif not is_right(row):
            yield f"{where}: served and wrong: " + ", ".join(f"{key} {row[key]}" for key in (*_MEASURES, "run"))


def _shown(row: Mapping[str, Any]) -> dict[str, str | None]:
    measures = {key: f"{row[key]:.4f}" for key in _MEASURES if row.get(key) is not None}
    what = row.get("refused") or row.get("failed") or ("" if is_right(row) else "WRONG")
    ran = {"run": f"{row['run']} of {GREEDY}"} if "run" in row else {}
    return {**{key: row[key] for key in ("model", "engine", "file")}, **measures, **ran, "what": what or None}


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table: of each engine the least overlaps of its files, and the shortest run."""
    lines = [f"| model | {' | '.join(_ENGINES)} |", f"|---|{'---|' * len(_ENGINES)}"]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [_cell([row for row in rows if (row["model"], row["engine"]) == (model, each)]) for each in _ENGINES]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    served = [row for row in rows if "overlap" in row]
    if not served:
        return "refused" if rows and all("refused" in row for row in rows) else "failed"
    values = [
        f"{min(found):.3f}" if (found := [row[key] for row in served if row.get(key) is not None]) else "-"
        for key in _MEASURES
    ]
    files = "" if len(served) == len(rows) else f" ({served[0]['file']})"
    return f"{', '.join(values)}, {min(row['run'] for row in served)}{files}"
