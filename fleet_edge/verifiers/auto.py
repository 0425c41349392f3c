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
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from fleet_common.host import NVIDIA_DRIVER, cache_folder, read_cache, write_cache
from fleet_edge.settings import AUTO, EdgeSettings
from fleet_edge.verifiers.contract import CapacityExceeded, Item, Logits, UnsupportedModel, Verifier, VerifierError
from fleet_edge.verifiers.registry import load_verifier
from fleet_edge.verifiers.source import check_gguf, check_source, is_gguf
from schemas.errors import FleetError

TORCH: Final = "torch"
LLAMA_CPP: Final = "llama.cpp"
INT8: Final = "int8"

_PACKAGES: Final = {TORCH: ("torch", "transformers"), LLAMA_CPP: ("llama_cpp",)}

_QUANTIZATION: Final = re.compile(r"[-.](?:[IT]?Q\d\w*|B?F16|F32|MXFP4)(?=[-.]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Candidate:
    engine: str
    target: str
    dtype: str = AUTO

    def __str__(self) -> str:
        return f"{self.engine} in {self.dtype}" if self.engine == TORCH and self.dtype != AUTO else self.engine


@dataclass(frozen=True, slots=True)
class Candidates:
    """At least one candidate, and why other engines are out, in clauses such as `llama.cpp is not installed`."""

    found: tuple[Candidate, ...]
    reasons: tuple[str, ...]


def is_installed(package: str) -> bool:
    return find_spec(package) is not None


def find_candidates(settings: EdgeSettings, *, installed: Callable[[str], bool] = is_installed) -> Candidates:
    """Return the engines that could serve the target, judged by files and packages.

    torch takes folders, repositories and, dequantized, GGUFs, on a CPU in int8 if no `dtype` is set; llama.cpp takes
    GGUFs. For a folder `NAME`, `NAME.gguf` and `NAME-<quantization>.gguf` next to it count as the same model; the
    largest is the closest to it. Raises `VerifierError` if there is no such target, or no installed engine could serve
    it.
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
        cpu = settings.torch_device == "cpu" or (settings.torch_device == AUTO and not NVIDIA_DRIVER.exists())
        int8 = cpu and settings.dtype == AUTO and installed("numba")
        found.append(Candidate(TORCH, settings.target, INT8 if int8 else settings.dtype))
    else:
        reasons.append("torch is not installed")
    given = {"dtype": settings.dtype, "torch_device": settings.torch_device}
    only_torch = next((f"{name} = {value}" for name, value in given.items() if value != AUTO), "")
    if not there[LLAMA_CPP]:
        reasons.append("llama.cpp is not installed")
    elif gguf is None:
        reasons.append(f"llama.cpp takes a GGUF, and there is none next to {settings.target}")
    elif only_torch and found:
        reasons.append(f"{only_torch} is a setting of torch")
    else:
        found.append(Candidate(LLAMA_CPP, str(gguf), settings.dtype))
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


MEASURED_BY: Final = frozenset(
    {"target", "dtype", "torch_device", "threads", "gpu_layers", "batch_invariant", "context", "kv_bytes"}
)
"""Settings that affect the speed of an engine."""

SHAPES: Final = ((1, 1), (1, 5), (4, 5), (16, 1), (16, 5))
"""Sequences and new tokens of each, `_CONTEXT` tokens into them: edge-only decoding and verified drafts."""

LONG: Final = (1, 5)
"""Shape that is also measured `_LONG_CONTEXT` tokens into a sequence, where the context allows it."""

_CONTEXT: Final = 256
_LONG_CONTEXT: Final = 1024
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

    `step_ms` has milliseconds of a step by shape (`4x5`, `1x5@1024`), as far as memory allows. `likely` has the most
    likely ids with probabilities at some positions of a fixed sequence.
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
    text = random.Random(_SEED).choices(range(info.vocabulary.size), k=_LONG_CONTEXT)  # noqa: S311 - no secret
    sequences = range(-1, -1 - max(count for count, _ in SHAPES), -1)  # no session has these
    step_ms = {}

    def note(name: str, count: int, tokens: int) -> None:
        length = verifier.computed(sequences[0])
        items = [Item(sequence, text[:tokens], tokens) for sequence in sequences[:count]]
        if length + tokens <= info.context and verifier.fits(items):
            step_ms[name] = 1e3 * _seconds(verifier, items, length, clock)

    try:
        verifier.open(sequences[0])
        likely = _likely(_prefill(verifier, sequences[0], text[:context]))
        there = 1 + _fork(verifier, sequences, context)
        for count, tokens in SHAPES:
            if count <= there:
                note(f"{count}x{tokens}", count, tokens)
        for sequence in sequences[1:]:
            verifier.close(sequence)
        rest = text[context:]
        if info.context >= _LONG_CONTEXT + _SPARE and verifier.fits([Item(sequences[0], rest, 0)]):
            _prefill(verifier, sequences[0], rest)
            note(f"{LONG[0]}x{LONG[1]}@{_LONG_CONTEXT}", *LONG)
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


_CHOICE_PACKAGES: Final = ("dssd-fleet", "torch", "transformers", "numba", "llama-cpp-python")
_CPU_KEYS: Final = ("model name", "flags", "Features", "CPU part")


def _circumstances(settings: EdgeSettings, candidates: Sequence[Candidate]) -> str:
    """Return a digest of everything that the speed of engines depends on."""
    pairs = (line.partition(":") for line in takewhile(str.strip, _lines(Path("/proc/cpuinfo"))))
    gpus = (_lines(path)[:1] for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")))
    found = {
        "machine": {
            "architecture": platform.machine(),
            "cpu": {key.strip(): value.strip() for key, _, value in pairs if key.strip() in _CPU_KEYS},
            "cores": len(os.sched_getaffinity(0)),
            "gpus": [line for lines in gpus for line in lines],
        },
        "versions": {name: _version(name) for name in _CHOICE_PACKAGES},
        "settings": settings.model_dump(mode="json", include=set(MEASURED_BY)),
        "candidates": [[candidate.engine, candidate.target, candidate.dtype] for candidate in candidates],
        "files": [file for candidate in candidates for file in _files(Path(candidate.target).expanduser())],
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


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
"""Limit to load and measure; a service has fifteen minutes to start, and there are up to three to measure."""


def measure_apart(
    candidate: Candidate, settings: EdgeSettings, *, longest_s: float = _LONGEST_S, program: str = _PROGRAM
) -> EngineReport:
    """Measure a candidate in a separate process, for at most `longest_s` seconds."""
    given = settings.model_dump(mode="json", include=set(MEASURED_BY))
    given |= asdict(candidate)
    # The same modules as in this process, and none of the working directory.
    places = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
    stdin, held = os.pipe()  # the program ends when this process does
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", program, json.dumps(given)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": places},
            timeout=longest_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return EngineReport(sentence=f"It took longer than {longest_s:.0f} s to load and measure.")
    finally:
        os.close(stdin)
        os.close(held)
    try:
        return EngineReport.model_validate_json(done.stdout)
    except ValidationError:
        return EngineReport(sentence=_end(done.returncode))


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


StepTimes = dict[str, dict[str, Milliseconds]]
"""Milliseconds of a step by candidate and shape; of all candidates the same shapes."""


class _Kept(BaseModel):
    circumstances: str
    engine: str
    target: str
    dtype: str
    step_ms: StepTimes
    at: str

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.engine, self.target, self.dtype)


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
    """Return the settings with an engine, its number format and the target that it serves; log the reason.

    Raises `VerifierError` if no installed engine can serve the target.
    """
    candidates = find_candidates(settings, installed=installed)
    if len(candidates.found) == 1:
        (only,) = candidates.found
        _log.info("Engine %s serves %s: %s.", only, only.target, "; ".join(candidates.reasons))
        return _with(settings, only)
    folder = folder or cache_folder()
    file = None if folder is None else folder / _FILE
    known = (None if file is None else read_cache(file, _Choices)) or _Choices()
    name = str(Path(settings.target).expanduser().resolve())
    now = _circumstances(settings, candidates.found)
    before = known.choices.get(name)
    if before is not None and before.circumstances == now:
        plain = [replace(each, dtype=settings.dtype) for each in candidates.found]
        if before.candidate in (*candidates.found, *plain):
            _log.info("%s Measured %s, kept in %s.", _said(before.candidate, before.step_ms), before.at, file)
            return _with(settings, before.candidate)
    _log.warning(
        "Engine auto: measuring once whether %s is faster on this machine; this may take some minutes.",
        " or ".join(map(str, candidates.found)),
    )
    usual = before.engine if before is not None else LLAMA_CPP if is_gguf(Path(settings.target)) else TORCH
    chosen, step_ms, remarks, lasting = _compared(_reports(candidates.found, settings, measure), usual=usual)
    _log.warning("%s%s", " ".join([_said(chosen, step_ms), *remarks]), _busy(file))
    if before is not None and before.candidate != chosen:
        _log.warning(
            "Until now it was %s on %s: generations in coupled mode may differ from earlier ones. To keep an "
            "engine, set it.",
            before.candidate,
            before.target,
        )
    if lasting:
        at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        _keep(file, known, name, _Kept(circumstances=now, **asdict(chosen), step_ms=step_ms, at=at))
    return _with(settings, chosen)


def _reports(
    candidates: Sequence[Candidate], settings: EdgeSettings, measure: Measure
) -> dict[Candidate, EngineReport]:
    """Measure candidates, and torch as the settings have it if it cannot serve the target in int8."""
    reports = {}
    for each in candidates:
        reports[each] = measure(each, settings)
        if reports[each].measurement is None and each.dtype != settings.dtype:
            plain = replace(each, dtype=settings.dtype)
            reports[plain] = measure(plain, settings)
    return reports


def _compared(reports: Mapping[Candidate, EngineReport], *, usual: str) -> tuple[Candidate, StepTimes, list[str], bool]:
    """Return the choice, times of what was measured, remarks, and whether to keep the choice.

    Raises `VerifierError` if no candidate can serve the target.
    """
    failed = {each: report for each, report in reports.items() if report.measurement is None}
    found = {each: report.measurement for each, report in reports.items() if report.measurement is not None}
    if not found:
        said = " ".join(f"{each}: {report.sentence}" for each, report in failed.items())
        raise VerifierError(f"No engine can serve the target model. {said}")
    remarks = [f"{each} cannot serve {each.target}: {report.sentence}" for each, report in failed.items()]
    first, *others = found
    for other in others:
        alike = _overlap(found[first], found[other])
        if alike < _ALIKE or found[other].vocabulary != found[first].vocabulary:
            del found[other]
            remarks.append(
                f"{other.target} is a different model in spite of its name: its distributions overlap with those of "
                f"{first.target} by {alike:.2f}."
            )
        elif other.target != first.target:
            remarks.append(f"Overlap of their distributions: {alike:.3f}.")
    shapes = [shape for shape in found[first].step_ms if all(shape in each.step_ms for each in found.values())]
    step_ms = {str(each): {shape: its.step_ms[shape] for shape in shapes} for each, its in found.items()}
    means = {each: _mean(step_ms[str(each)]) for each in found}
    chosen = min(means, key=lambda each: means[each])
    for each, mean in means.items():
        if each.engine == usual and mean < _WORTH_A_CHANGE * means[chosen]:
            chosen = each
    return chosen, step_ms, remarks, all(report.lasting for report in failed.values())


def _overlap(one: EngineMeasurement, other: EngineMeasurement) -> float:
    """Return the mean overlap of two distributions over positions, as far as both are known."""
    shared = []
    for left, right in zip(one.likely, other.likely, strict=False):
        common = sum(min(p, right.get(token, 0.0)) for token, p in left.items())
        shared.append(common / max(1e-9, min(sum(left.values()), sum(right.values()))))
    return sum(shared) / max(1, len(shared))


def _mean(step_ms: Mapping[str, float]) -> float:
    return math.exp(sum(map(math.log, step_ms.values())) / max(1, len(step_ms)))


def _busy(file: Path | None) -> str:
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load <= _BUSY * cores:
        return ""
    return (
        f" The machine was busy (load {load:.1f} on {cores} cores), so the figures may mislead: to have it measured "
        f"again, remove {file}."
    )


def _said(chosen: Candidate, step_ms: Mapping[str, Mapping[str, float]]) -> str:
    others = "".join(f", and {_mean(its):.1f} ms in {name}" for name, its in step_ms.items() if name != str(chosen))
    shapes = ", ".join(
        f"{shape} {' and '.join(f'{its[shape]:.1f}' for its in step_ms.values())}" for shape in step_ms[str(chosen)]
    )
    return (
        f"Engine {chosen} serves {chosen.target}: a step takes {_mean(step_ms[str(chosen)]):.1f} ms in it{others} "
        f"(geometric mean; by sequences x new tokens, in {' and '.join(step_ms)}: {shapes})."
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
    return settings.model_copy(update=asdict(chosen))
