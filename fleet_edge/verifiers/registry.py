"""Registry: check and load the verifier that the settings name.

A new verifier is a module with a `load` function, and a line in `VERIFIERS` of the settings. A `check` function next to
`load` takes the settings, imports nothing heavy, and finds errors before anything is loaded. A verifier's module is
imported only when it is used, so an edge needs only the libraries of its engine.
"""

import logging
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

from fleet_edge.settings import AUTO, VERIFIERS, EdgeSettings
from fleet_edge.verifiers.contract import Verifier, VerifierError
from fleet_edge.verifiers.source import check_source, is_gguf

_log = logging.getLogger(__name__)


def check_verifier(settings: EdgeSettings) -> None:
    """Check the target model that the settings name, without loading it; raises `VerifierError`."""
    if settings.engine == AUTO:
        from fleet_edge.verifiers.auto import find_candidates  # noqa: PLC0415 - only for `auto`

        find_candidates(settings)
        return
    module = resolve_name(VERIFIERS[settings.engine].partition(":")[0])
    if hasattr(module, "check"):
        module.check(settings)


def load_verifier(settings: EdgeSettings) -> Verifier:
    """Load the target model in the engine that the settings name; for `auto` in the fastest.

    Raises `VerifierError` if it cannot be loaded.
    """
    if settings.engine != AUTO:
        return _load(settings)
    from fleet_edge.verifiers.auto import choose_engine  # noqa: PLC0415 - only for `auto`

    chosen = choose_engine(settings)
    try:
        return _load(chosen)
    except VerifierError as error:
        if chosen.dtype == settings.dtype:
            raise
        _log.warning("The engine %s serves %s without %s: %s", chosen.engine, chosen.target, chosen.dtype, error)
    return _load(chosen.model_copy(update={"dtype": settings.dtype}))


def _load(settings: EdgeSettings) -> Verifier:
    verifier: Verifier = resolve_name(VERIFIERS[settings.engine])(settings)
    return verifier


def check_target_files(settings: EdgeSettings) -> None:
    """Check that the files with the target's tokens exist; raises `VerifierError`."""
    if settings.engine == "remote":
        from fleet_edge.verifiers.remote.loading import check_local  # noqa: PLC0415 - only with this engine

        check_local(settings.target)
    else:
        check_source(settings.target)


def read_target_tokens(settings: EdgeSettings) -> list[str]:
    """Return the target's token strings by id, without padding and without loading its weights.

    Raises `VerifierError` if they cannot be read.
    """
    check_target_files(settings)
    path = Path(settings.target).expanduser()
    if settings.engine == "remote":
        from fleet_edge.verifiers.remote.loading import load_local  # noqa: PLC0415

        return load_local(settings.target).strings
    if is_gguf(path) and find_spec("llama_cpp") is not None:
        from fleet_edge.verifiers.llama_cpp.slab import GgufTarget  # noqa: PLC0415 - an edge may do without it

        file = GgufTarget(path, vocabulary_only=True)
        try:
            return file.strings
        finally:
            file.close()
    if find_spec("torch") is None:
        raise VerifierError(
            f"Reading the tokens of {settings.target} needs the extra `edge`; install it: pip install "
            "'dssd-fleet[edge]', or name a GGUF as target."
        )
    from fleet_edge.verifiers.packed.target import target_tokens  # noqa: PLC0415 - likewise

    return target_tokens(settings.target)
