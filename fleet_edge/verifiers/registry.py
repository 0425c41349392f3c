"""Check and load the verifier that the settings name.

A new verifier is a module with a `load` function, and a line in `VERIFIERS` of the settings. A `check` function next to
`load` takes the settings too, imports nothing heavy, and finds mistakes before anything is loaded. A verifier's module
is only imported when it is used, so an edge needs no library but those of its engine.
"""

from pkgutil import resolve_name

from fleet_edge.settings import AUTO, VERIFIERS, EdgeSettings
from fleet_edge.verifiers.contract import Verifier


def check_verifier(settings: EdgeSettings) -> None:
    """Check that the target model that the settings name is there, as far as that is known before it is loaded.

    Raises:
        VerifierError: It is not.
    """
    if settings.engine == AUTO:
        from fleet_edge.verifiers.auto.candidates import find_candidates  # noqa: PLC0415 - only for `auto`

        find_candidates(settings)
        return
    module = resolve_name(VERIFIERS[settings.engine].partition(":")[0])
    if hasattr(module, "check"):
        module.check(settings)


def load_verifier(settings: EdgeSettings) -> Verifier:
    """Load the target model that the settings name, in the engine that they name, or in the fastest for `auto`.

    Raises:
        VerifierError: It cannot be loaded.
    """
    if settings.engine == AUTO:
        from fleet_edge.verifiers.auto.choice import choose_engine  # noqa: PLC0415 - only for `auto`

        settings = choose_engine(settings)
    verifier: Verifier = resolve_name(VERIFIERS[settings.engine])(settings)
    return verifier
