"""Registry of verifiers: the engines that a target model runs in, by the names that the settings know them by.

A new verifier is a module with a `load` function, and a line here. A `check` function beside it, which takes the
settings too and imports nothing heavy, tells what is wrong before anything is loaded. Nothing is imported before it is
asked for: the settings take the names from here, and an edge needs no library but those of the verifier that it uses.
"""

from collections.abc import Mapping
from pkgutil import resolve_name
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fleet_edge.settings import EdgeSettings
    from fleet_edge.verifiers.contract import Verifier

__all__ = ["AUTO", "VERIFIERS", "check_verifier", "load_verifier"]

AUTO: Final = "auto"
"""The engine is the faster one, measured on this machine, of those that are installed and can serve the target."""

VERIFIERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "llama.cpp": "fleet_edge.verifiers.llama_cpp.loader:load",
        "torch": "fleet_edge.verifiers.packed.verifier:load",
        "remote": "fleet_edge.verifiers.remote.verifier:load",
    }
)
"""By engine, the function that takes the edge's settings and returns the verifier."""


def check_verifier(settings: "EdgeSettings") -> None:
    """Check that the target model that the settings name is there, as far as that is known before it is loaded.

    Raises:
        VerifierError: It is not.
    """
    if settings.engine == AUTO:
        from fleet_edge.verifiers.auto.candidates import find_candidates  # noqa: PLC0415 - it knows the settings

        find_candidates(settings)
        return
    module = resolve_name(VERIFIERS[settings.engine].partition(":")[0])
    if hasattr(module, "check"):
        module.check(settings)


def load_verifier(settings: "EdgeSettings") -> "Verifier":
    """Load the target model that the settings name, in the engine that they name, or in the fastest for `auto`.

    Raises:
        VerifierError: It cannot be loaded.
    """
    if settings.engine == AUTO:
        from fleet_edge.verifiers.auto.choice import choose_engine  # noqa: PLC0415 - it knows the settings

        settings = choose_engine(settings)
    verifier: Verifier = resolve_name(VERIFIERS[settings.engine])(settings)
    return verifier
