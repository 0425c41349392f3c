"""Registry: check and load the verifier that the settings name.

A new verifier is a module with a `load` function, and a line in `VERIFIERS` of the settings. A `check` function next to
`load` takes the settings, imports nothing heavy, and finds errors before anything is loaded. A verifier's module is
imported only when it is used, so an edge needs only the libraries of its engine.
"""

import logging
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Final

from fleet_common.host import NVIDIA_DRIVER
from fleet_edge.settings import AUTO, MTP, VERIFIERS, EdgeSettings, KeptIn
from fleet_edge.verifiers.contract import (
    DraftsItself,
    OnProgress,
    UnsupportedModel,
    Verifier,
    VerifierError,
    no_progress,
)
from fleet_edge.verifiers.source import check_gguf_reader, check_source, is_gguf
from schemas.control import ChatFormat

_log = logging.getLogger(__name__)


def check_verifier(settings: EdgeSettings) -> None:
    """Check the target model that the settings name, without loading it; raises `VerifierError`."""
    _check(choose_engine(settings))


def load_verifier(settings: EdgeSettings, on_progress: OnProgress = no_progress) -> Verifier:
    """Load the target model in the engine that the settings name; raises `VerifierError` if it cannot be loaded."""
    chosen = choose_engine(settings)
    verifier: Verifier = resolve_name(VERIFIERS[chosen.engine])(chosen, on_progress)
    return verifier


def check_draft(settings: EdgeSettings) -> None:
    """Check the edge's draft model, if there is to be one, without loading it; raises `VerifierError`."""
    if settings.edge_draft == MTP:
        if choose_engine(settings).engine != "blocks":
            raise VerifierError(_NO_MTP)
        from fleet_edge.verifiers.blocks_engine import check_mtp  # noqa: PLC0415 - an engine's

        check_mtp(settings)
    elif settings.edge_draft:
        check_verifier(_draft_settings(settings))


def _draft_settings(settings: EdgeSettings) -> EdgeSettings:
    return settings.model_copy(
        update={
            "target": settings.edge_draft,
            "engine": AUTO,
            "kv_bytes": settings.kv_bytes // _DRAFT_SHARE,
            "kv_kept": KeptIn.NOTHING,
        }
    )


def load_draft(settings: EdgeSettings, target: Verifier) -> Verifier | None:
    """Load the edge's draft model, if there is to be one; raises `VerifierError` if it cannot draft for the target."""
    if settings.edge_draft == MTP and not isinstance(target, DraftsItself):
        raise VerifierError(_NO_MTP)
    if settings.edge_draft in ("", MTP):
        return None
    verifier = load_verifier(_draft_settings(settings))
    if verifier.info.vocabulary != target.info.vocabulary:
        raise VerifierError(
            f"The draft model {verifier.info.name} has another vocabulary than {target.info.name}; set edge_draft to a "
            "smaller model of the target's family."
        )
    return verifier


_NO_MTP: Final = (
    "Only the engine blocks drafts with a layer of the target (MTP); set engine to blocks and target to a GGUF with "
    "such a layer, or edge_draft to a small model."
)
_DRAFT_SHARE: Final = 4
"""Part of `kv_bytes` that the draft model gets in addition."""


def choose_engine(settings: EdgeSettings) -> EdgeSettings:
    """Return the settings with an engine in place of `auto`, and log the reason.

    torch takes GPUs, and a target for which `dtype` is given; `blocks` the architectures that it serves on
    this processor; llama.cpp other GGUFs, and torch other folders. Raises `VerifierError` if there is no such target,
    or no installed engine serves it.
    """
    if settings.engine != AUTO:
        return settings
    check_source(settings.target)
    engine, reason = _rule(settings)
    _log.info("Engine %s serves %s: %s.", engine, settings.target, reason)
    return settings.model_copy(update={"engine": engine})


def _rule(settings: EdgeSettings) -> tuple[str, str]:
    """Return the engine that serves an existing target here, and the reason."""
    if settings.dtype != AUTO:
        return "torch", "dtype is a setting of torch"
    if NVIDIA_DRIVER.exists() and find_spec("torch") is not None and _transformers_reads(settings):
        return "torch", "there is a GPU"
    other, package = ("llama.cpp", "llama_cpp") if is_gguf(Path(settings.target).expanduser()) else ("torch", "torch")
    if find_spec("numba") is None:
        return other, "the libraries of blocks are not installed"
    from fleet_edge.verifiers.blocks.products import PORTABLE, variants  # noqa: PLC0415 - takes a second
    from fleet_edge.verifiers.blocks_engine import check_architecture  # noqa: PLC0415

    if variants()[0] == PORTABLE and find_spec(package) is not None:
        return other, "blocks has no fast products for this processor"
    try:
        check_architecture(settings)
    except UnsupportedModel as error:
        if find_spec(package) is None:
            raise
        return other, str(error)
    return "blocks", "it serves this architecture on CPUs"


def _transformers_reads(settings: EdgeSettings) -> bool:
    path = Path(settings.target).expanduser()
    if is_gguf(path):
        try:
            check_gguf_reader(path)
        except UnsupportedModel:
            return False
    return True


def _check(settings: EdgeSettings) -> None:
    module = resolve_name(VERIFIERS[settings.engine].partition(":")[0])
    if hasattr(module, "check"):
        module.check(settings)


def check_target_files(settings: EdgeSettings) -> None:
    """Check that the files with the target's tokens exist; raises `VerifierError`."""
    if settings.engine == "remote":
        from fleet_edge.verifiers.remote.local import check_local  # noqa: PLC0415 - only with this engine

        check_local(settings.target)
    else:
        check_source(settings.target)


def read_chat_format(settings: EdgeSettings, end_tokens: Iterable[int]) -> ChatFormat | None:
    """Return how the target reads a chat, from its files; None, with a warning, if they do not say."""
    from fleet_edge.verifiers.tokens import chat_format  # noqa: PLC0415 - reads GGUFs

    try:
        check_target_files(settings)
        found = chat_format(settings.target, end_tokens)
    except VerifierError as error:
        _log.warning("Devices use the chat template of their draft model: %s", error)
        return None
    if found is None:
        _log.info("The target has no chat template; devices use that of their draft model.")
    return found


def read_target_tokens(settings: EdgeSettings) -> list[str]:
    """Return the target's token strings by id, without padding and without loading its weights.

    Raises `VerifierError` if they cannot be read.
    """
    check_target_files(settings)
    if settings.engine == "remote":
        from fleet_edge.verifiers.remote.local import load_local  # noqa: PLC0415

        return load_local(settings.target).strings
    from fleet_edge.verifiers.tokens import target_tokens  # noqa: PLC0415 - reads GGUFs

    return target_tokens(settings.target)
