"""Model sources: the forms of the setting `model`, and the file that each means.

Three forms::

    /data/models/draft.gguf                          a file
    owner/name:file.gguf, owner/name:*q4_0.gguf      a file of a Hugging Face repository, by name or pattern
    smollm2-135m:Q4_0, smollm2-135m                  a model that `fleet models prepare` made
"""

import fnmatch
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fleet_device.drafters.contract import ModelNotFound

_PREPARED = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)(?::(?P<quantization>\w+))?")
_REPOSITORY = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+):(?P<pattern>[^:]+)")
_SHARD = re.compile(r"-(?P<part>\d{5})-of-\d{5}\.gguf$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """A draft model on this machine.

    Attributes:
        path: The GGUF.
        name: For the log; the configuration's words, where they say more than the path.
    """

    path: Path
    name: str


class Hub(Protocol):
    """What is needed of a Hugging Face client."""

    def files(self, repository: str) -> Sequence[str]:
        """Return the names of a repository's files.

        Raises:
            ModelNotFound: With the reason, and what to do.
        """

    def fetch(self, repository: str, file: str) -> Path:
        """Return a file's path in the local cache, downloading it if need be.

        Raises:
            ModelNotFound: With the reason, and what to do.
        """


def locate_model(model: str, *, folder: Path, hub: Callable[[], Hub] | None = None) -> LocatedModel:
    """Find the file that the configuration key `model` means.

    Args:
        model: One of the three forms above.
        folder: Of prepared models.
        hub: Makes the client for the second form, which only that form needs.

    Raises:
        ModelNotFound: With one sentence that says what to do.
    """
    text = model.strip()
    if not text:
        raise ModelNotFound(
            "No draft model is configured; name a .gguf file, owner/name:file.gguf, or a prepared model "
            "such as smollm2-135m:Q4_0."
        )
    path = Path(text).expanduser()
    if path.is_file():
        return LocatedModel(path, path.stem)
    if match := _REPOSITORY.fullmatch(text):
        return _from_hub(match["repository"], match["pattern"], (hub or _hugging_face)())
    if os.sep in text or text.lower().endswith(".gguf"):
        what = "is a folder, not a GGUF file" if path.is_dir() else "does not exist"
        raise ModelNotFound(f"The draft model {path} {what}; check the configuration key 'model'.")
    if match := _PREPARED.fullmatch(text):
        return _prepared(match["name"], match["quantization"], folder)
    raise ModelNotFound(
        f"{text!r} names no draft model; give a .gguf file, owner/name:file.gguf, or a prepared model "
        "such as smollm2-135m:Q4_0."
    )


def _prepared(name: str, quantization: str | None, folder: Path) -> LocatedModel:
    drafts = sorted((folder / name).glob("*.gguf"))
    if not drafts:
        raise ModelNotFound(
            f"No model {name} is prepared in {folder.absolute()}; run 'fleet models prepare' there, or name another "
            "folder as models_dir."
        )
    names = [draft.stem for draft in drafts]
    if quantization is None:
        if len(drafts) == 1:
            return LocatedModel(drafts[0], name)
        raise ModelNotFound(
            f"The prepared model {name} has several quantizations; add one, such as {name}:{names[0]} "
            f"(there are {', '.join(names)})."
        )
    for draft in drafts:
        if draft.stem.lower() == quantization.lower():
            return LocatedModel(draft, name)
    raise ModelNotFound(f"The prepared model {name} has no quantization {quantization}; there are {', '.join(names)}.")


def _from_hub(repository: str, pattern: str, hub: Hub) -> LocatedModel:
    name = repository.rsplit("/", 1)[1]
    if not any(character in pattern for character in "*?["):
        return LocatedModel(hub.fetch(repository, pattern), name)
    files = [file for file in hub.files(repository) if fnmatch.fnmatchcase(file.lower(), pattern.lower())]
    files = [file for file in files if file.lower().endswith(".gguf")]
    # Of a model in several files llama.cpp opens the first and finds the others beside it.
    shards = [match for file in files if (match := _SHARD.search(file))]
    if files and len(shards) == len(files) and len({_SHARD.sub("", file) for file in files}) == 1:
        fetched = [hub.fetch(repository, file) for file in sorted(files)]
        return LocatedModel(fetched[0], name)
    if len(files) == 1:
        return LocatedModel(hub.fetch(repository, files[0]), name)
    if not files:
        raise ModelNotFound(f"No GGUF file of {repository} matches {pattern!r}; look at its list of files.")
    raise ModelNotFound(
        f"Several files of {repository} match {pattern!r} ({', '.join(sorted(files)[:4])}); name one of them."
    )


def _hugging_face() -> Hub:
    try:
        from fleet_device.drafters.hugging_face import HuggingFace  # noqa: PLC0415 - an optional package
    except ImportError:
        raise ModelNotFound(
            "Fetching a model from a Hugging Face repository needs huggingface_hub; install it with: "
            "pip install huggingface_hub"
        ) from None
    return HuggingFace()
