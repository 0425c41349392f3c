"""An importer that hides installed packages, as where they are not installed."""

import importlib.abc
import importlib.machinery
from collections.abc import Sequence
from types import ModuleType


class Without(importlib.abc.MetaPathFinder):
    def __init__(self, *packages: str) -> None:
        self._packages = packages

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in self._packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None
