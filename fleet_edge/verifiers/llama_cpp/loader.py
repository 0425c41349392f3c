"""Loads the llama.cpp verifier as the edge's settings say."""

from importlib.util import find_spec
from pathlib import Path

from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import UnsupportedModel, Verifier, VerifierError
from fleet_edge.verifiers.source import check_source, is_gguf


def check(settings: EdgeSettings) -> None:
    """Check that the target model that the settings name is a GGUF, as far as a glance at its file tells.

    Raises:
        VerifierError: It is not, or llama.cpp is not installed.
    """
    if find_spec("llama_cpp") is None:
        raise VerifierError(
            "The engine llama.cpp needs the extra `edge-llama`; install it: pip install 'dssd-fleet[edge-llama]'; or "
            "set engine to another one."
        )
    check_source(settings.target)
    if not is_gguf(Path(settings.target).expanduser()):
        raise UnsupportedModel(
            f"The engine llama.cpp takes a GGUF, and {settings.target} is none; name a .gguf file as target, or set "
            "engine to torch."
        )


def load(settings: EdgeSettings) -> Verifier:
    """Load the target model that the settings name.

    Raises:
        VerifierError: It cannot be loaded.
    """
    check(settings)
    from fleet_edge.verifiers.llama_cpp.target import open_target  # noqa: PLC0415 - only where a model is loaded
    from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier  # noqa: PLC0415

    target = open_target(Path(settings.target), gpu_layers=settings.gpu_layers)
    return LlamaCppVerifier(
        target,
        budget_bytes=settings.kv_bytes,
        context=settings.context,
        threads=settings.threads,
        batch_invariant=settings.batch_invariant,
    )
