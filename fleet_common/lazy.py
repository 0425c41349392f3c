"""Lazy imports: a package's public names, each imported from its module on first use."""

import ast
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path


def lazy_names(package: str, file: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package, whose names are imported below `if TYPE_CHECKING:`.

    Those imports are read from the package's source, so that type checkers and programs have one list.
    """

    @cache
    def modules() -> dict[str, str]:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        declared = next(node for node in tree.body if isinstance(node, ast.If)).body
        found = (node for node in declared if isinstance(node, ast.ImportFrom) and node.module)
        return {alias.name: str(node.module) for node in found for alias in node.names}

    def get(name: str) -> object:
        if name.startswith("__") or name not in modules():  # the import system asks for `__path__` and the like
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules()[name]), name)

    def list_names() -> list[str]:
        return sorted(modules())

    return get, list_names
