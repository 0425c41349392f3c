"""Remote verifier: the target model on inference servers (vLLM), which may span GPUs and machines.

This module checks and loads it; it needs no httpx.
"""

from typing import TYPE_CHECKING

from fleet_common.extras import install_command
from fleet_edge.verifiers.contract import OnProgress, Verifier, VerifierError, no_progress
from fleet_edge.verifiers.remote.local import check_local, endpoint_url, key_headers, load_local, sample_tokens

if TYPE_CHECKING:
    from fleet_edge.settings import EdgeSettings


def check(settings: "EdgeSettings") -> None:
    """Check addresses, key and tokenizer, and that httpx is installed; raises `VerifierError`."""
    try:
        import httpx  # noqa: F401, PLC0415 - comes with the extra
    except ImportError as error:
        raise VerifierError(
            f"The engine `remote` needs the extra `edge-remote`; install it: {install_command('edge-remote')}"
        ) from error
    endpoint_url(settings.remote.endpoint)
    key_headers(settings.remote.api_key_file)
    check_local(settings.target)


def load(settings: "EdgeSettings", _on_progress: OnProgress = no_progress) -> Verifier:
    """Connect to the servers in the settings, and verify that they serve the target; raises `VerifierError`."""
    check(settings)
    from fleet_edge.verifiers.remote.verifier import connect  # noqa: PLC0415 - only where it is installed

    local = load_local(settings.target)
    samples = sample_tokens(local.strings, local.end_tokens)
    return connect(settings.remote, local, endpoint_url(settings.remote.endpoint), samples=samples)
