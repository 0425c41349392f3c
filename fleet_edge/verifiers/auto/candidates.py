"""Candidates: the engines that are installed, each with the form of the target model that it would serve.

torch takes folders, repositories and, dequantized, GGUFs; llama.cpp takes GGUFs. Of a folder `NAME`, `NAME.gguf` and
`NAME-<quantization>.gguf` beside it are taken for the same model; the largest is the closest to it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fleet_edge.verifiers.contract import VerifierError
from fleet_edge.verifiers.source import check_gguf, check_source, is_gguf

if TYPE_CHECKING:
    from fleet_edge.settings import EdgeSettings

TORCH: Final = "torch"
LLAMA_CPP: Final = "llama.cpp"

_PACKAGES: Final = {TORCH: ("torch", "transformers"), LLAMA_CPP: ("llama_cpp",)}

_QUANTIZATION: Final = re.compile(r"[-.](?:[IT]?Q\d\w*|B?F16|F32|MXFP4)(?=[-.]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One engine and what it would serve.

    Attributes:
        engine: By its name in the settings.
        target: As the setting `target` would name it.
    """

    engine: str
    target: str


@dataclass(frozen=True, slots=True)
class Candidates:
    """What there is to choose from.

    Attributes:
        found: At least one.
        reasons: Why others are out, in clauses such as `llama.cpp is not installed`.
    """

    found: tuple[Candidate, ...]
    reasons: tuple[str, ...]


def is_installed(package: str) -> bool:
    """Return whether a package can be imported; it is not."""
    return find_spec(package) is not None


def find_candidates(settings: "EdgeSettings", *, installed: Callable[[str], bool] = is_installed) -> Candidates:
    """Return which engines could serve the target, as far as a glance at files and packages tells.

    Args:
        settings: The edge's.
        installed: Whether a package can be imported.

    Raises:
        VerifierError: There is no such target, or nothing that is installed could serve it.
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
        reasons.append(f"llama.cpp takes a GGUF, and there is none beside {settings.target}")
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
    """Return the GGUF beside a folder that by its name is the same model; of several the largest."""
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


def _only_torch(settings: "EdgeSettings") -> str:
    """Return a setting that has a value, and that torch alone has; empty if there is none."""
    given = {"dtype": settings.dtype, "torch_device": settings.torch_device}
    return next((f"{name} = {value}" for name, value in given.items() if value != "auto"), "")
