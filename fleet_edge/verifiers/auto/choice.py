"""Choice of the engine where the setting is `auto`: measured once, then kept as long as the circumstances last.

A choice that is made anew may be another one. The law holds with every engine; but each rounds in its own way, and two
forms of one model differ by their quantization, so that a text in coupled mode repeats bit for bit only with the same
engine over the same file. A change is therefore never silent, and never made for a few per cent.
"""

import hashlib
import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, Field, ValidationError

from fleet_common.host import cache_folder, read_cache, write_cache
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.auto.candidates import LLAMA_CPP, TORCH, Candidate, find_candidates, is_installed
from fleet_edge.verifiers.auto.measurement import MEASURED_BY, Measurement, Milliseconds, Report
from fleet_edge.verifiers.contract import VerifierError
from fleet_edge.verifiers.source import is_gguf

_PACKAGES: Final = ("dssd-fleet", "torch", "transformers", "llama-cpp-python")
_CPU_KEYS: Final = ("model name", "flags", "Features", "CPU part")


def circumstances(
    settings: "EdgeSettings", candidates: Sequence[Candidate], *, depends_on: Sequence[str], root: Path = Path("/")
) -> str:
    """Return a digest of all that the speed of engines depends on.

    Args:
        settings: The edge's.
        candidates: What is measured; their targets are local.
        depends_on: Settings that count.
        root: Above `proc`.
    """
    found = {
        "machine": {
            "architecture": platform.machine(),
            "cpu": _cpu(root),
            "cores": len(os.sched_getaffinity(0)),
            "gpus": _gpus(root),
        },
        "versions": {name: _version(name) for name in _PACKAGES},
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
    """Return what the system says of its first processor."""
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
    """Return path, size and time of change of each file of a target."""
    paths = sorted(target.iterdir()) if target.is_dir() else [target]
    found: list[list[Any]] = []
    for path in paths:
        try:
            state = path.stat()
        except OSError:
            continue
        found.append([str(path.resolve()), state.st_size, state.st_mtime_ns])
    return found


_PROGRAM: Final = "fleet_edge.verifiers.auto.measurement"

_LONGEST_S: Final = 300.0
"""To load and to measure; a service has fifteen minutes to start in, and there are two engines."""


def measure_apart(
    candidate: Candidate, settings: EdgeSettings, *, longest_s: float = _LONGEST_S, program: str = _PROGRAM
) -> Report:
    """Measure a candidate.

    Args:
        candidate: What is measured.
        settings: The edge's; what else an engine depends on.
        longest_s: Seconds after which it is given up.
        program: Module to run.
    """
    given = settings.model_dump(mode="json", include=set(MEASURED_BY))
    given |= {"engine": candidate.engine, "target": candidate.target}
    # The same modules as this process has, wherever it has them from, and none from a folder that it happens to be in.
    places = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
    late = threading.Event()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", program, json.dumps(given)],
        stdin=subprocess.PIPE,  # open while we live
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
        return Report(sentence=f"It took longer than {longest_s:.0f} s to load and to measure.")
    try:
        return Report.model_validate_json(answer)
    except ValidationError:
        return Report(sentence=_end(process.returncode))


def _end(code: int) -> str:
    if code == -signal.SIGKILL:
        return "Its process was killed, most likely since the machine has too little memory for it."
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"Its process {how} without an answer."


_log = logging.getLogger(__name__)

_FILE: Final = "engines.json"
_MOST_KEPT: Final = 64

_WORTH_A_CHANGE: Final = 1.1
"""The engine of before, or at first that of the form that the setting names, stays unless another one is so many times
as fast."""

_BUSY: Final = 1.5
"""Threads that want to run, for each core, from which on a measurement says little."""

_ALIKE: Final = 0.5
"""Overlap of two forms' distributions. Quantization to four bits leaves 0.7 and more; other models have less."""

Measure = Callable[[Candidate, EdgeSettings], Report]


class _Kept(BaseModel):
    """One target's choice."""

    circumstances: str
    engine: str
    target: str
    step_ms: dict[str, Milliseconds]
    at: str


class _Choices(BaseModel):
    """The cache file: choices by the target that the settings name."""

    format: Literal[1] = 1
    choices: dict[str, _Kept] = Field(default_factory=dict)


def choose_engine(
    settings: EdgeSettings,
    *,
    measure: Measure = measure_apart,
    folder: Path | None = None,
    installed: Callable[[str], bool] = is_installed,
) -> EdgeSettings:
    """Return the settings with an engine, and with the form of the target that it serves; log why it is that one.

    Args:
        settings: The edge's; their engine is `auto`.
        measure: Measures a candidate.
        folder: Of cache files; by default the user's.
        installed: Whether a package can be imported.

    Raises:
        VerifierError: No engine that is installed can serve the target.
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
            "Until now it was %s on %s: a text in coupled mode that was written before may come out otherwise now. To "
            "keep an engine, set it.",
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


def _measured(reports: Mapping[Candidate, Report], *, usual: str) -> tuple[Candidate, dict[str, float], str, bool]:
    """Return the choice, the milliseconds a step by engine, a remark, and whether the choice will hold.

    Args:
        reports: By candidate.
        usual: Engine that is taken unless another one is much faster.

    Raises:
        VerifierError: No candidate can serve the target.
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
        f" {named} was taken for the same model by its name, but is another one: its distributions overlap with those "
        f"of {first.target} by {alike:.2f}."
    )


def _overlap(one: Measurement, other: Measurement) -> float:
    """Return the mean over positions of what two distributions have in common, as far as both are known."""
    shared = []
    for left, right in zip(one.likely, other.likely, strict=False):
        common = sum(min(p, right.get(token, 0.0)) for token, p in left.items())
        shared.append(common / max(1e-9, min(sum(left.values()), sum(right.values()))))
    return sum(shared) / max(1, len(shared))


def _mean(measurement: Measurement, shapes: set[str] | Mapping[str, float]) -> float:
    """Return the geometric mean of the milliseconds of some shapes."""
    return math.exp(sum(math.log(measurement.step_ms[shape]) for shape in shapes) / max(1, len(shapes)))


def _busy(file: Path | None) -> str:
    """Return a remark if the machine had other work."""
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
            "The choice of the engine cannot be kept and is made anew at the next start: %s; set XDG_CACHE_HOME to a "
            "folder that can be written, or set engine.",
            error,
        )


def _with(settings: EdgeSettings, chosen: Candidate) -> EdgeSettings:
    return settings.model_copy(update={"engine": chosen.engine, "target": chosen.target})
