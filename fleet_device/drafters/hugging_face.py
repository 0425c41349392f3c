"""Draft models of Hugging Face repositories.

Import this module only where a model is named by its repository: the hub's client takes a while.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from fleet_common.hub import hub_access, hub_name
from fleet_device.drafters.contract import ModelNotFound

_MODEL: Final = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_OTHER_FORM: Final = ["original/*", "consolidated*"]  # the same weights once more


class HuggingFace:
    """The client of `model_source`, which turns each failure into a sentence."""

    def files(self, repository: str) -> Sequence[str]:
        """Return the names of a repository's files, of the cached ones while the hub cannot be reached."""
        try:
            with hub_access() as reachable:
                return list(list_repo_files(repository)) if reachable else _cached_files(repository)
        except Exception as error:
            raise _sentence(repository, None, error) from error

    def fetch(self, repository: str, file: str) -> Path:
        """Return a file's path in the local cache, downloading it if necessary."""
        try:
            with hub_access():
                return Path(hf_hub_download(repository, file))
        except Exception as error:
            raise _sentence(repository, file, error) from error

    def folder(self, repository: str) -> Path:
        """Return the folder with a repository's weights, configuration and tokenizer, fetched as far as necessary."""
        try:
            with hub_access():
                return Path(snapshot_download(repository, allow_patterns=_MODEL, ignore_patterns=_OTHER_FORM))
        except Exception as error:
            raise _sentence(repository, None, error) from error


def _cached_files(repository: str) -> list[str]:
    folder = Path(snapshot_download(repository, local_files_only=True))
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _sentence(repository: str, file: str | None, error: Exception) -> ModelNotFound:
    match error:
        case GatedRepoError():
            text = (
                f"The repository {repository} requires its terms to be accepted; accept them on its page, then set the "
                "environment variable HF_TOKEN."
            )
        case RepositoryNotFoundError():
            text = f"There is no public repository {repository}; check the name, or set HF_TOKEN if it is private."
        # Not in the cache, and no network to fetch it from: a kind of EntryNotFoundError, so it comes first.
        case LocalEntryNotFoundError() | OfflineModeIsEnabled():
            text = (
                f"The model {repository} is not in the local cache, and {hub_name()} cannot be reached; "
                "connect once, or copy the GGUF here and name its path."
            )
        case EntryNotFoundError():
            text = f"The repository {repository} has no file {file}; look at its list of files."
        case HFValidationError():
            text = f"{repository!r} is not a repository name; write owner/name:file.gguf."
        case HfHubHTTPError():
            text = f"The repository {repository} could not be read: {_first_line(error)}"
        case _:
            text = (
                f"The model {repository} could not be fetched ({type(error).__name__}); "
                "check the network and the disk, or copy the GGUF here and name its path."
            )
    return ModelNotFound(text)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
