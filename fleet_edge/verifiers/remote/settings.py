"""Settings of the remote verifier: where the inference servers are, and how long they may take."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from fleet_runtime.fields import setting

__all__ = ["RemoteSettings"]


class RemoteSettings(BaseModel):
    """Inference servers that compute the target model; read where the setting `engine` is `remote`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    endpoints: str = setting(
        "",
        "Addresses of inference servers that serve the same model, with commas between them: "
        "`http://10.0.0.5:8000,http://10.0.0.6:8000`.",
    )
    api: Literal["vllm", "sglang"] = setting("vllm", "What the inference servers are.")
    api_key_file: Path | None = setting(
        None, "File with the key that the inference servers ask for; only its owner may read it."
    )
    server_ca: Path | None = setting(
        None,
        "Certificates (PEM) of those who may vouch for inference servers at https:// addresses; left out, those that "
        "the system trusts.",
        rare=True,
    )
    served_model: str = setting(
        "", "Name of the model at the inference servers; may be left out where they serve one.", rare=True
    )
    top_logprobs: int = setting(
        50,
        "Log-probabilities asked for at each position: the largest `top_k` that devices may use.",
        ge=1,
        le=4096,
    )
    request_s: float = setting(
        5.0,
        "Longest wait for an inference server's answer; then another one is asked.",
        unit="seconds",
        rare=True,
        gt=0,
        le=600,
    )
    step_s: float = setting(
        15.0,
        "Longest time of one step, all attempts at all inference servers included.",
        unit="seconds",
        rare=True,
        gt=0,
        le=600,
    )
    health_s: float = setting(
        2.0,
        "How often each inference server is asked whether it is well.",
        unit="seconds",
        rare=True,
        gt=0,
        le=600,
    )
    away_s: float = setting(
        5.0,
        "Time without any inference server after which this edge is offline to its devices, until one is back.",
        unit="seconds",
        rare=True,
        ge=0,
        le=3600,
    )
    connections: int = setting(
        64, "Most connections to each inference server.", unit="connections", rare=True, ge=1, le=4096
    )
    known_tokens: int = setting(
        1 << 20,
        "Most tokens of all open texts; what the inference servers' memory for keys and values holds is a good value.",
        unit="tokens",
        rare=True,
        ge=1,
        le=1 << 40,
    )
