"""Check of a pair: finds both models, reads their facts, and judges whether they fit."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from fleet_cli.models.manifest import read_manifest
from fleet_cli.models.pair.facts import Form, ModelFacts
from fleet_cli.models.pair.findings import Finding, Outcome, findings_of
from fleet_cli.models.pair.folder_facts import folder_facts
from fleet_cli.models.pair.gguf_facts import gguf_facts
from fleet_cli.models.pair.gguf_header import ModelUnreadable
from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.gguf import GgufModel
from fleet_device.drafters.model_source import locate_model
from fleet_device.drafters.unlike import CommonTokens

__all__ = ["CheckedPair", "check_pair", "locate_target"]


@dataclass(frozen=True, slots=True)
class CheckedPair:
    """A pair, and what was found.

    Attributes:
        draft: What the device would draft with.
        target: What the edge would verify with.
        findings: One an aspect.
    """

    draft: ModelFacts
    target: ModelFacts
    findings: Sequence[Finding] = field(default=())

    @property
    def refused(self) -> list[Finding]:
        """Why it does not fit; nothing if it does."""
        return [finding for finding in self.findings if finding.outcome is Outcome.REFUSED]


def check_pair(draft: str, target: str, *, models_dir: Path, target_vocabulary: Path | None = None) -> CheckedPair:
    """Check a pair.

    Args:
        draft: As the device's setting `model` takes it.
        target: A GGUF, a folder, or a model that was prepared.
        models_dir: Of prepared models.
        target_vocabulary: A GGUF of the target, or its vocabulary's file, where the target is a folder.

    Raises:
        FleetError: One of both cannot be found or read.
    """
    if Path(draft).expanduser().is_dir():
        raise ModelUnreadable(
            f"The draft model {draft} is a folder, and devices draft with a GGUF; convert it, or did you mean "
            f"`fleet models check {target} {draft}`?"
        )
    drafting = gguf_facts(locate_model(draft, folder=models_dir).path)
    path = locate_target(target, models_dir)
    verifying = folder_facts(path) if path.is_dir() else gguf_facts(path)
    known = target_vocabulary.expanduser() if target_vocabulary is not None else None
    if known is None and verifying.form is Form.GGUF:
        known = path

    def overlap() -> CommonTokens | None:
        return None if known is None else _common(Path(drafting.source), known, verifying)

    return CheckedPair(drafting, verifying, findings_of(drafting, verifying, overlap=overlap))


def locate_target(target: str, models_dir: Path) -> Path:
    """Return the file or folder that is meant.

    Raises:
        ModelUnreadable: There is none.
    """
    path = Path(target).expanduser()
    if path.exists():
        return path
    family, _, step = target.partition(":")
    prepared = models_dir / family
    if family and "/" not in target and read_manifest(prepared) is not None:
        for found in (prepared / (step or "target"), prepared / f"{step}.gguf"):
            if found.exists():
                return found
        raise ModelUnreadable(f"The prepared model {family} has no {step or 'target'}; see `fleet models list`.")
    hint = "; of a repository, fetch the files first" if target.count("/") == 1 else ""
    raise ModelUnreadable(f"There is no file or folder {target}, and no model of that name is prepared{hint}.")


def _common(draft: Path, target: Path, verifying: ModelFacts) -> CommonTokens:
    try:
        with (
            closing(GgufModel(draft, vocabulary_only=True)) as own,
            closing(GgufModel(target, vocabulary_only=True)) as other,
        ):
            return _in_common(own, other, verifying)
    except DrafterError as error:
        raise ModelUnreadable(str(error)) from error


def _in_common(own: GgufModel, other: GgufModel, verifying: ModelFacts) -> CommonTokens:
    if other.vocabulary != verifying.vocabulary:
        raise ModelUnreadable(
            f"The file {other.path} has another vocabulary than the target {verifying.source}; name a GGUF of the same "
            "model with --target-vocabulary."
        )
    return CommonTokens(own, own.vocabulary.size, other, other.vocabulary.size)
