"""Engine `auto`: find the engines that could serve the target here, measure them, and choose one.

Usage as a program, whose memory is freed when it ends: python -m fleet_edge.verifiers.auto SETTINGS

SETTINGS is JSON: the fields of `MEASURED_BY` and the engine. The program prints an `EngineReport` as one line of JSON,
and ends when its standard input is closed.

A choice is measured once and kept until something relevant changes. All engines preserve the target distribution, but
round differently, so generations in coupled mode repeat bit for bit only with the same engine and file. A change is
therefore logged, and never made for a few per cent.
"""

import hashlib
import json
import logging
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from fleet_common.host import cache_folder, read_cache, write_cache
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import CapacityExceeded, Item, Logits, UnsupportedModel, Verifier, VerifierError
from fleet_edge.verifiers.registry import load_verifier
from fleet_edge.verifiers.source import check_gguf, check_source, is_gguf
from schemas.errors import FleetError

TORCH: Final = "torch"
LLAMA_CPP: Final = "llama.cpp"

_PACKAGES: Final = {TORCH: ("torch", "transformers"), LLAMA_CPP: ("llama_cpp",)}

_QUANTIZATION: Final = re.compile(r"[-.](?:[IT]?Q\d\w*|B?F16|F32|MXFP4)(?=[-.]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Candidate:
    engine: str
    target: str


@dataclass(frozen=True, slots=True)
class Candidates:
    """At least one candidate, and why other engines are out, in clauses such as `llama.cpp is not installed`."""

    found: tuple[Candidate, ...]
    reasons: tuple[str, ...]


def is_installed(package: str) -> bool:
    return find_spec(package) is not None


def find_candidates(settings: EdgeSettings, *, installed: Callable[[str], bool] = is_installed) -> Candidates:
    """Return the engines that could serve the target, judged by files and packages.

    torch takes folders, repositories and, dequantized, GGUFs; llama.cpp takes GGUFs. For a folder `NAME`, `NAME.gguf`
    and `NAME-<quantization>.gguf` next to it count as the same model; the largest is the closest to it. Raises
    `VerifierError` if there is no such target, or no installed engine could serve it.
    """
    there = {engine: all(map(installed, packages)) for engine, packages in _PACKAGES.items()}
    if not any(there.values()):
        raise VerifierError(
            "Neither torch nor llama.cpp is installed, one of which the target model runs in; install one: pip install "
            "'dssd-fleet[edge]' for torch, or 'dssd-fleet[edge-llama]' for llama.cpp, which takes a GGUF; or set "
            "engine to remote."
        )
    check_source(settings.target)
    path = Path(settings.target).expanduser()
    gguf = path if is_gguf(path) else gguf_beside(path)
    found, reasons = [], []
    if there[TORCH]:
        found.append(Candidate(TORCH, settings.target))
    else:
        reasons.append("torch is not installed")
    only_torch = _only_torch(settings)
    if not there[LLAMA_CPP]:
        reasons.append("llama.cpp is not installed")
    elif gguf is None:
        reasons.append(f"llama.cpp takes a GGUF, and there is none next to {settings.target}")
    elif only_torch and found:
        reasons.append(f"{only_torch} is a setting of torch")
    else:
        found.append(Candidate(LLAMA_CPP, str(gguf)))
    if not found:
        raise VerifierError(
            f"Of the engines llama.cpp alone is installed, which takes a GGUF, and {settings.target} is none; name a "
            ".gguf file as target, or install torch: pip install 'dssd-fleet[edge]'."
        )
    return Candidates(tuple(found), tuple(reasons))


def gguf_beside(folder: Path) -> Path | None:
    """Return the largest GGUF next to a folder that is the same model by its name."""
    if not folder.is_dir():
        return None
    folder = folder.resolve()
    found = [path for path in folder.parent.glob("*.gguf") if _QUANTIZATION.sub("", path.stem) == folder.name]
    whole = [path for path in found if _is_gguf(path)]
    return max(whole, key=lambda path: (path.stat().st_size, path.name), default=None)


def _is_gguf(path: Path) -> bool:
    try:
        check_gguf(path)
    except (VerifierError, OSError):
        return False
    return True


def _only_torch(settings: EdgeSettings) -> str:
    given = {"dtype": settings.dtype, "torch_device": settings.torch_device}
    return next((f"{name} = {value}" for name, value in given.items() if value != "auto"), "")


MEASURED_BY: Final = frozenset(
    {"target", "dtype", "torch_device", "threads", "gpu_layers", "batch_invariant", "context", "kv_bytes"}
)
"""Settings that affect the speed of an engine."""

SHAPES: Final = ((1, 1), (4, 5), (16, 1))
"""Sequences and new tokens of each: one and many in edge-only decoding, and some that are verified."""

_CONTEXT: Final = 256
_SPARE: Final = 8
_CHUNK: Final = 128
_ROWS: Final = 8
_IDS: Final = 64
_SEED: Final = 20_261_126
_REPEATS: Final = 5
_FEWEST_REPEATS: Final = 2
_SHAPE_S: Final = 3.0

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class EngineMeasurement(BaseModel):
    """Result of a measurement.

    `step_ms` has milliseconds of a step by shape (`4x5`), as far as memory allows. `likely` has the most likely ids
    with probabilities at some positions of a fixed sequence.
    """

    step_ms: dict[str, Milliseconds]
    runs_on: str
    vocabulary: str
    likely: list[dict[int, Probability]]


class EngineReport(BaseModel):
    """Answer of the program: the measurement, or why there is none, and whether that is permanent."""

    measurement: EngineMeasurement | None = None
    sentence: str = ""
    lasting: bool = False


def measure(verifier: Verifier, clock: Callable[[], float]) -> EngineMeasurement:
    """Measure a verifier without open sequences, and leave it so."""
    info = verifier.info
    context = max(1, min(_CONTEXT, info.context - _SPARE))
    text = random.Random(_SEED).choices(range(info.vocabulary.size), k=context)  # noqa: S311 - no secret
    sequences = range(-1, -1 - max(count for count, _ in SHAPES), -1)  # no session has these
    step_ms = {}
    try:
        likely = _likely(_prefill(verifier, sequences[0], text))
        there = 1 + _fork(verifier, sequences, context)
        for count, tokens in SHAPES:
            items = [Item(sequence, text[-tokens:], tokens) for sequence in sequences[:count]]
            if count <= there and context + tokens <= info.context and verifier.fits(items):
                step_ms[f"{count}x{tokens}"] = 1e3 * _seconds(verifier, items, context, clock)
    finally:
        for sequence in sequences:
            verifier.close(sequence)
    return EngineMeasurement(step_ms=step_ms, runs_on=info.runs_on, vocabulary=str(info.vocabulary), likely=likely)


def main(arguments: Sequence[str]) -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Keep output of native libraries out of the answer.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    (text,) = arguments
    try:
        verifier = load_verifier(EdgeSettings.model_validate_json(text))
        report = EngineReport(measurement=measure(verifier, time.perf_counter))
    except FleetError as error:
        report = EngineReport(sentence=str(error), lasting=isinstance(error, UnsupportedModel))
    except MemoryError:
        report = EngineReport(sentence="The machine has no memory for it.")
    answer.write(report.model_dump_json() + "\n")
    answer.flush()
    return 0


def _prefill(verifier: Verifier, sequence: int, text: Sequence[int]) -> NDArray[np.float32]:
    verifier.open(sequence)
    rows = min(_ROWS, len(text))
    head, tail = text[:-rows], text[-rows:]
    for begin in range(0, len(head), _CHUNK):
        verifier.score([Item(sequence, head[begin : begin + _CHUNK], 0)])
    return _on_host(verifier.score([Item(sequence, tail, rows)]))


def _fork(verifier: Verifier, sequences: Sequence[int], length: int) -> int:
    """Copy the first sequence to the others, as far as memory allows; return the number of copies."""
    for number, sequence in enumerate(sequences[1:]):
        try:
            verifier.fork(sequence, sequences[0], length)
        except CapacityExceeded:
            return number
    return len(sequences) - 1


def _seconds(verifier: Verifier, items: Sequence[Item], context: int, clock: Callable[[], float]) -> float:
    """Return the shortest time of some steps: other work on the machine only adds to it."""
    taken: list[float] = []
    first = clock()
    while len(taken) <= _FEWEST_REPEATS or (len(taken) <= _REPEATS and clock() - first < _SHAPE_S):
        before = clock()
        _on_host(verifier.score(items)[:1, :1])  # waits for a GPU
        taken.append(clock() - before)
        for item in items:
            verifier.truncate(item.sequence, context)
    return min(taken)


def _likely(rows: NDArray[np.float32]) -> list[dict[int, float]]:
    found = []
    for row in rows.astype(np.float64):
        probs = np.exp(row - row.max())
        probs /= probs.sum()
        best = np.argsort(-probs)[:_IDS]
        found.append({int(index): float(probs[index]) for index in best})
    return found


def _on_host(logits: Logits) -> NDArray[np.float32]:
    if isinstance(logits, np.ndarray):
        return logits.copy()
    host: Any = logits.cpu().numpy()
    return np.array(host, dtype=np.float32)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))


_CHOICE_PACKAGES: Final = ("dssd-fleet", "torch", "transformers", "llama-cpp-python")
_CPU_KEYS: Final = ("model name", "flags", "Features", "CPU part")


def circumstances(
    settings: EdgeSettings, candidates: Sequence[Candidate], *, depends_on: Sequence[str], root: Path = Path("/")
) -> str:
    """Return a digest of everything that the speed of engines depends on."""
    found = {
        "machine": {
            "architecture": platform.machine(),
            "cpu": _cpu(root),
            "cores": len(os.sched_getaffinity(0)),
            "gpus": _gpus(root),
        },
        "versions": {name: _version(name) for name in _CHOICE_PACKAGES},
        "settings": settings.model_dump(mode="json", include=set(depends_on)),
        "candidates": [[candidate.engine, candidate.target] for candidate in candidates],
        "files": [file for candidate in candidates for file in _files(Path(candidate.target).expanduser())],
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu(root: Path) -> dict[str, str]:
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs if key.strip() in _CPU_KEYS}


def _gpus(root: Path) -> list[str]:
    found = []
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        try:
            found.append(path.read_text(encoding="utf-8", errors="replace").splitlines()[0])
        except (OSError, IndexError):
            continue
    return found


def _files(target: Path) -> list[list[Any]]:
    paths = sorted(target.iterdir()) if target.is_dir() else [target]
    found: list[list[Any]] = []
    for path in paths:
        try:
            state = path.stat()
        except OSError:
            continue
        found.append([str(path.resolve()), state.st_size, state.st_mtime_ns])
    return found


_PROGRAM: Final = "fleet_edge.verifiers.auto"

_LONGEST_S: Final = 300.0
"""Limit to load and measure; a service has fifteen minutes to start, and there are two engines."""


def measure_apart(
    candidate: Candidate, settings: EdgeSettings, *, longest_s: float = _LONGEST_S, program: str = _PROGRAM
) -> EngineReport:
    """Measure a candidate in a separate process, for at most `longest_s` seconds."""
    given = settings.model_dump(mode="json", include=set(MEASURED_BY))
    given |= {"engine": candidate.engine, "target": candidate.target}
    # The same modules as in this process, and none of the working directory.
    places = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
    late = threading.Event()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", program, json.dumps(given)],
        stdin=subprocess.PIPE,  # open as long as this process lives
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": places},
    ) as process:

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(longest_s, give_up)
        timer.start()
        try:
            assert process.stdout is not None
            answer = process.stdout.read()
            process.wait()
        finally:
            timer.cancel()
            process.kill()
    if late.is_set():
        return EngineReport(sentence=f"It took longer than {longest_s:.0f} s to load and measure.")
    try:
        return EngineReport.model_validate_json(answer)
    except ValidationError:
        return EngineReport(sentence=_end(process.returncode))


def _end(code: int) -> str:
    if code == -signal.SIGKILL:
        return "Its process was killed, most likely since the machine has too little memory for it."
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"Its process {how} without an answer."


_log = logging.getLogger(__name__)

_FILE: Final = "engines.json"
_MOST_KEPT: Final = 64

_WORTH_A_CHANGE: Final = 1.1
"""Speed-up from which an engine replaces the previous one, or at first the one native to the target's format."""

_BUSY: Final = 1.5
"""Load per core above which measurements are unreliable."""

_ALIKE: Final = 0.5
"""Overlap of two distributions from which models count as the same. Four-bit quantization leaves 0.7 and more."""

Measure = Callable[[Candidate, EdgeSettings], EngineReport]


class _Kept(BaseModel):
    circumstances: str
    engine: str
    target: str
    step_ms: dict[str, Milliseconds]
    at: str


class _Choices(BaseModel):
    """The cache file: choices by the target in the settings."""

    format: Literal[1] = 1
    choices: dict[str, _Kept] = Field(default_factory=dict)


def choose_engine(
    settings: EdgeSettings,
    *,
    measure: Measure = measure_apart,
    folder: Path | None = None,
    installed: Callable[[str], bool] = is_installed,
) -> EdgeSettings:
    """Return the settings with an engine and the target that it serves; log the reason.

    Raises `VerifierError` if no installed engine can serve the target.
    """
    candidates = find_candidates(settings, installed=installed)
    if len(candidates.found) == 1:
        (only,) = candidates.found
        _log.info("Engine %s serves %s: %s.", only.engine, only.target, "; ".join(candidates.reasons))
        return _with(settings, only)
    folder = folder or cache_folder()
    file = None if folder is None else folder / _FILE
    known = (None if file is None else read_cache(file, _Choices)) or _Choices()
    name = str(Path(settings.target).expanduser().resolve())
    now = circumstances(settings, candidates.found, depends_on=sorted(MEASURED_BY))
    before = known.choices.get(name)
    if before is not None and before.circumstances == now:
        chosen = Candidate(before.engine, before.target)
        if chosen in candidates.found:
            _log.info("%s Measured %s, kept in %s.", _said(chosen, before.step_ms), before.at, file)
            return _with(settings, chosen)
    _log.warning(
        "Engine auto: measuring once whether %s is faster on this machine; this may take some minutes.",
        " or ".join(candidate.engine for candidate in candidates.found),
    )
    usual = before.engine if before is not None else LLAMA_CPP if is_gguf(Path(settings.target)) else TORCH
    reports = {each: measure(each, settings) for each in candidates.found}
    chosen, step_ms, remark, lasting = _measured(reports, usual=usual)
    _log.warning("%s%s%s", _said(chosen, step_ms), remark, _busy(file))
    if before is not None and (before.engine, before.target) != (chosen.engine, chosen.target):
        _log.warning(
            "Until now it was %s on %s: generations in coupled mode may differ from earlier ones. To keep an "
            "engine, set it.",
            before.engine,
            before.target,
        )
    if lasting:
        kept = _Kept(
            circumstances=now,
            engine=chosen.engine,
            target=chosen.target,
            step_ms=step_ms,
            at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
        _keep(file, known, name, kept)
    return _with(settings, chosen)


def _measured(
    reports: Mapping[Candidate, EngineReport], *, usual: str
) -> tuple[Candidate, dict[str, float], str, bool]:
    """Return the choice, milliseconds by engine, a remark, and whether to keep the choice.

    Raises `VerifierError` if no candidate can serve the target.
    """
    failed = {each: report for each, report in reports.items() if report.measurement is None}
    found = {each: report.measurement for each, report in reports.items() if report.measurement is not None}
    if not found:
        said = " ".join(f"{each.engine}: {report.sentence}" for each, report in failed.items())
        raise VerifierError(f"No engine can serve the target model. {said}")
    if failed:
        ((only, measurement),) = found.items()
        ((other, report),) = failed.items()
        lasting = report.lasting
        step_ms = {only.engine: _mean(measurement, measurement.step_ms)}
        return only, step_ms, f" {other.engine} cannot serve {other.target}: {report.sentence}", lasting
    first, *others = found
    alike = min((_overlap(found[first], found[other]) for other in others), default=1.0)
    if alike < _ALIKE or len({measurement.vocabulary for measurement in found.values()}) > 1:
        return first, {first.engine: _mean(found[first], found[first].step_ms)}, _unlike(first, others, alike), True
    shapes = set.intersection(*(set(measurement.step_ms) for measurement in found.values()))
    step_ms = {each.engine: _mean(measurement, shapes) for each, measurement in found.items()}
    chosen = min(found, key=lambda each: step_ms[each.engine])
    for each in found:
        if each.engine == usual and step_ms[each.engine] < _WORTH_A_CHANGE * step_ms[chosen.engine]:
            chosen = each
    remark = f" Overlap of their distributions: {alike:.3f}." if len({each.target for each in found}) > 1 else ""
    return chosen, step_ms, remark, True


def _unlike(first: Candidate, others: Sequence[Candidate], alike: float) -> str:
    named = ", ".join(other.target for other in others)
    return (
        f" {named} is another model despite its name: its distributions overlap with those of {first.target} by "
        f"{alike:.2f}."
    )


def _overlap(one: EngineMeasurement, other: EngineMeasurement) -> float:
    """Return the mean overlap of two distributions over positions, as far as both are known."""
    shared = []
    for left, right in zip(one.likely, other.likely, strict=False):
        common = sum(min(p, right.get(token, 0.0)) for token, p in left.items())
        shared.append(common / max(1e-9, min(sum(left.values()), sum(right.values()))))
    return sum(shared) / max(1, len(shared))


def _mean(measurement: EngineMeasurement, shapes: set[str] | Mapping[str, float]) -> float:
    return math.exp(sum(math.log(measurement.step_ms[shape]) for shape in shapes) / max(1, len(shapes)))


def _busy(file: Path | None) -> str:
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load <= _BUSY * cores:
        return ""
    return (
        f" The machine was busy (load {load:.1f} on {cores} cores), so the figures may mislead: to have it measured "
        f"again, remove {file}."
    )


def _said(chosen: Candidate, step_ms: Mapping[str, float]) -> str:
    others = "".join(f", and {ms:.1f} ms in {name}" for name, ms in step_ms.items() if name != chosen.engine)
    return (
        f"Engine {chosen.engine} serves {chosen.target}: a step takes {step_ms[chosen.engine]:.1f} ms in it{others} "
        "(geometric mean of 1, 4 and 16 texts with 1, 5 and 1 new tokens)."
    )


def _keep(file: Path | None, known: _Choices, name: str, kept: _Kept) -> None:
    choices = {each: choice for each, choice in known.choices.items() if each != name}
    choices = dict(list(choices.items())[-(_MOST_KEPT - 1) :]) | {name: kept}
    try:
        if file is None:
            raise FileNotFoundError("this user has no home")
        write_cache(file, _Choices(choices=choices))
    except OSError as error:
        _log.warning(
            "The choice of the engine cannot be saved and is measured again at the next start: %s; set XDG_CACHE_HOME "
            "to a writable folder, or set engine.",
            error,
        )


def _with(settings: EdgeSettings, chosen: Candidate) -> EdgeSettings:
    return settings.model_copy(update={"engine": chosen.engine, "target": chosen.target})
