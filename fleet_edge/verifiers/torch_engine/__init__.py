"""Verifier on PyTorch: check and load it; this module needs neither torch nor transformers."""

from importlib.util import find_spec

from fleet_common.extras import install_command
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import OnProgress, Verifier, VerifierError, no_progress
from fleet_edge.verifiers.source import check_source


def check(settings: EdgeSettings) -> None:
    """Check that there is a target model, from its files alone; raises `VerifierError` also without torch."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise VerifierError(
            "The engine torch needs the extra `edge-torch`; set engine to another one, or install it: "
            f"{install_command('edge-torch')}"
        )
    check_source(settings.target)


def load(settings: EdgeSettings, _on_progress: OnProgress = no_progress) -> Verifier:
    check(settings)  # before transformers is imported, which takes seconds
    import torch  # noqa: PLC0415 - only where a model is loaded

    from fleet_edge.verifiers.torch_engine.target import best_device, load_target  # noqa: PLC0415
    from fleet_edge.verifiers.torch_engine.verifier import TorchVerifier  # noqa: PLC0415

    if settings.threads:
        torch.set_num_threads(settings.threads)
    target = load_target(settings.target, dtype=settings.dtype, device=best_device())
    return TorchVerifier(target, budget_bytes=settings.kv_bytes)
