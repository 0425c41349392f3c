"""Target sources: check a folder, GGUF or repository before anything is loaded."""

import glob
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fleet_common.extras import install_command
from fleet_common.gguf_files import GgufUnreadable, read_header
from fleet_common.host import available_memory
from fleet_edge.verifiers.contract import GEMMA2_CAPS, RUNNING_STATE, UnsupportedModel, VerifierError, running_state

_log = logging.getLogger(__name__)

_CONFIG: Final = "config.json"
_WEIGHTS: Final = ("*.safetensors", "pytorch_model*.bin")
_GGUF_MAGIC: Final = b"GGUF"


def check_source(source: str | Path) -> None:
    """Check that there is a target model to load: a transformers folder, a GGUF's path, or a repository id.

    Raises `UnsupportedModel` if the files are not a model's, `VerifierError` if there is no such model, or it is
    neither cached nor can it be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        check_folder(path)
    elif is_gguf(path):
        check_gguf(path)
    else:
        check_repository(str(source))


def is_gguf(path: Path) -> bool:
    """A path that names a GGUF, or an existing file."""
    return path.is_file() or path.suffix.lower() == ".gguf"


def check_folder(path: Path) -> None:
    """Check that a folder holds configuration and weights; raises `UnsupportedModel`."""
    if not (path / _CONFIG).is_file():
        raise UnsupportedModel(f"The folder {path} has no config.json; give a folder that holds a whole model.")
    if not any(any(path.glob(pattern)) for pattern in _WEIGHTS):
        raise UnsupportedModel(f"The folder {path} has no weights; put the model's *.safetensors files there.")


def check_gguf(path: Path) -> None:
    """Check that a file is a GGUF; raises `UnsupportedModel`, or `VerifierError` if there is none."""
    if not path.is_file():
        raise VerifierError(f"There is no file {path}; check the target model's path.")
    with path.open("rb") as file:
        if file.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise UnsupportedModel(f"The file {path} is not a GGUF; give a GGUF, a folder or a repository id.")


_READ_BY_TRANSFORMERS: Final = ("llama", "qwen2", "gemma2", "gemma3")
"""Architectures whose GGUFs transformers reads such that the output is the model's."""


def check_gguf_reader(path: Path) -> None:
    """Check that transformers reads a GGUF's model as it was trained; raises `UnsupportedModel`.

    It leaves out what a GGUF has of scaled rotary embeddings, and fails at some models whose parts have sizes of their
    own.
    """
    try:
        header = read_header(path)
    except GgufUnreadable as error:
        raise UnsupportedModel(str(error)) from error
    kind = str(header.metadata.get("general.architecture"))
    if kind in RUNNING_STATE:
        raise running_state(kind, "torch")
    scaling = str(header.metadata.get(f"{kind}.rope.scaling.type", "none"))
    caps = [header.metadata.get(f"{kind}.{name}_logit_softcapping", its) for name, its in GEMMA2_CAPS.items()]
    # By this word in the name transformers takes another architecture, which it cannot read.
    renamed = kind == "llama" and "mistral" in str(header.metadata.get("general.name", "")).lower()
    if kind not in _READ_BY_TRANSFORMERS or renamed or header.metadata.get(f"{kind}.expert_count", 0):
        reason = f"transformers does not read this {kind} model from a GGUF"
    elif scaling != "none" or "rope_freqs.weight" in header.tensors:
        reason = "transformers does not read its scaled rotary embedding from a GGUF"
    elif kind == "gemma2" and caps != list(GEMMA2_CAPS.values()):
        reason = "transformers does not read the bounds of its scores and logits from a GGUF"
    else:
        return
    raise UnsupportedModel(
        f"The engine torch cannot serve {path.name}, because {reason}; set engine to auto or llama.cpp."
    )


def window_limit(path: Path) -> int:
    """Return the longest sequence of a GGUF that lacks the sliding window of its model, and say so; 0 for no limit."""
    try:
        window = read_header(path).lost_window if is_gguf(path) else 0
    except GgufUnreadable as error:
        raise UnsupportedModel(str(error)) from error
    if window:
        _log.warning(
            "%s lacks the sliding window that its model was trained with, so sequences have at most its %d tokens; for "
            "longer ones set target to a folder with the model's safetensors.",
            path.name,
            window,
        )
    return window


def check_repository(name: str) -> None:
    """Check a repository's name, and that it is cached or the hub reachable; raises `VerifierError`."""
    owner, _, rest = name.partition("/")
    if not owner or not rest or "/" in rest or name.startswith((".", "~")):
        raise VerifierError(f"There is no folder or file {name}; check the target model's path.")
    try:
        from fleet_common.hub import hub_name, is_cached, is_reachable  # noqa: PLC0415 - needs the hub's client
    except ImportError:
        raise VerifierError(
            f"There is no folder or file {name}, and fetching a model from a hub needs the extra `edge`; correct the "
            f"target model's path, or install it: {install_command('edge')}"
        ) from None
    if not is_cached(name, _CONFIG) and not is_reachable():
        raise VerifierError(
            f"The target model {name} is no folder or file, is not in the local cache, and {hub_name()} cannot be "
            "reached; correct the path, connect once, or copy the model here."
        )


_BEGINNING: Final = 1 << 20
_SAMPLES: Final = 4096
_SAMPLE_BYTES: Final = 4096
"""Of each file the beginning, with the model's geometry, and this number of samples: 16 MiB of a file of any size."""

_SPLIT: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


def weights_digest(path: Path) -> bytes:
    """Return a hash of a model's files that differs where the weights do; cheap for files of any size.

    Files of up to 17 MiB count whole. Of larger ones it reads samples at even distances, which reach every tensor of
    more than 1/4,096 of the file.
    """
    digest = hashlib.sha256()
    for file in _weight_files(path):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        step = max(_SAMPLE_BYTES, (size - _BEGINNING) // _SAMPLES)
        with file.open("rb") as stream:
            digest.update(stream.read(_BEGINNING))
            for begin in range(_BEGINNING, size, step):
                stream.seek(begin)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.digest()


def _weight_files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield path / _CONFIG
        for pattern in _WEIGHTS:
            yield from sorted(path.glob(pattern))
    elif split := _SPLIT.fullmatch(path.name):
        yield from sorted(path.parent.glob(f"{glob.escape(split['stem'])}-*-of-{split['count']}.gguf"))
    else:
        yield path


_GIGA: Final = 1e9


def check_memory(name: str, needed: int | None, advice: str) -> None:
    """Check that weights fit into memory; raises `VerifierError`. An unknown size counts as fitting."""
    available = available_memory()
    if needed is not None and available is not None and needed > available:
        raise VerifierError(
            f"Loading {name} takes {needed / _GIGA:.1f} GB of memory, and {available / _GIGA:.1f} GB are left; stop "
            f"other programs, {advice}."
        )


def fetch_files(repository: str, *patterns: str) -> Path:
    """Return the folder with a repository's files, which are fetched unless they are cached; raises `VerifierError`."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only for a repository

    from fleet_common.hub import hub_access  # noqa: PLC0415 - likewise

    with hub_access():
        try:
            return Path(snapshot_download(repository, allow_patterns=list(patterns)))
        except Exception as error:  # the client raises its own errors, the network's and the system's
            raise VerifierError(
                f"The target model {repository} cannot be fetched from here; give a folder, a GGUF or a repository id "
                f"that can: {str(error).partition(chr(10))[0]}"
            ) from error


def target_name(source: str | Path) -> str:
    """Return a model's name for the log: its repository, file or folder; of `<family>/target`, the family."""
    path = Path(source).expanduser()
    if not path.exists():
        return str(source)
    path = path.resolve()
    return path.parent.name if path.name == "target" else path.name
