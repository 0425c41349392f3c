"""Loads the packed verifier as the edge's settings say."""

from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import Verifier
from fleet_edge.verifiers.packed.source import check_source

__all__ = ["check", "load"]


def check(settings: EdgeSettings) -> None:
    """Check that there is a target model as the settings name it, as far as a glance at its files tells.

    Raises:
        VerifierError: There is none.
    """
    check_source(settings.target)


def load(settings: EdgeSettings) -> Verifier:
    """Load the target model that the settings name.

    Raises:
        VerifierError: It cannot be loaded.
    """
    check(settings)  # before transformers is imported, which takes seconds
    import torch  # noqa: PLC0415 - only where a model is loaded

    from fleet_edge.verifiers.packed.target import load_target  # noqa: PLC0415
    from fleet_edge.verifiers.packed.verifier import PackedVerifier  # noqa: PLC0415

    if settings.threads:
        torch.set_num_threads(settings.threads)
    target = load_target(settings.target, dtype=settings.dtype, device=settings.torch_device)
    return PackedVerifier(target, budget_bytes=settings.kv_bytes)
