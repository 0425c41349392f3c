"""Device's configuration: TOML, environment (`FLEET_DEVICE_…`, nested with `__`) and flags."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BeforeValidator, Field, SecretStr, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from fleet_device.drafters.registry import DRAFTERS
from fleet_link.settings import BrokerSettings
from schemas.bounds import MAX_DRAFT, MAX_TOKENS
from schemas.names import Name
from schemas.policy import MAX_TOP_K, Mode, SamplingPolicy, random_seed

__all__ = ["AUTO", "DeviceSettings", "read_draft_length"]

if TYPE_CHECKING:
    DrafterName = str
else:
    DrafterName = Literal[tuple(DRAFTERS)]

AUTO: Final = "auto"

# One sentence for a value that fits neither kind; pydantic would give one for each kind.
_LENGTH = TypeAdapter(Annotated[int, Field(ge=0, le=MAX_DRAFT)])
_YES_OR_NO = TypeAdapter(bool)


def read_draft_length(value: object) -> int | Literal["auto"]:
    """Read a draft length.

    Raises:
        ValueError: It is none; the text says what one is.
    """
    try:
        return AUTO if value == AUTO else _LENGTH.validate_python(value)
    except ValidationError:
        raise ValueError(f"a draft has 0 to {MAX_DRAFT} tokens, or {AUTO!r} lets the device choose") from None


def read_ahead(value: object) -> bool | Literal["auto"]:
    """Read whether to draft ahead.

    Raises:
        ValueError: It is neither; the text says what there is.
    """
    try:
        return AUTO if value == AUTO else _YES_OR_NO.validate_python(value)
    except ValidationError:
        raise ValueError(f"it is true, false, or {AUTO!r}") from None


class DeviceSettings(BaseSettings):
    """All settings of one device.

    Attributes:
        fleet: The fleet's name.
        device: This device's name; its identity at the broker.
        broker: Where the broker is.
        model: The draft model: a name made by `fleet models prepare` (`smollm2-135m:Q4_0`), a GGUF file, or a file of a
            Hugging Face repo (`owner/name:file.gguf`).
        models: Folder of the prepared models.
        drafter: `llama.cpp`, or `prompt-lookup`, which needs only the vocabulary of the model file.
        threads: Of llama.cpp.
        context: Most tokens in a sequence.
        gpu_layers: Layers on a GPU.
        draft_length: Tokens in a draft; `auto` lets the device choose by what it measures.
        ahead: Whether to draft ahead of the verdict; `auto` chooses with `draft_length`, and waits where that is fixed.
        mode: How drafts are verified.
        temperature: Sampling temperature; 0 is greedy.
        top_k: Tokens kept; 0 keeps all.
        top_p: Mass kept; 1 keeps all.
        seed: Of every coin; random for each text if left out.
        max_new_tokens: Most tokens of a text.
        open_s: Longest wait for an edge to answer.
        resume_s: Longest wait for an edge to take a session over again.
        verdict_s: Wait before an unanswered draft is repeated.
        drain_s: Seconds that the open text has to end when the device is asked to stop.
        api_port: Port of the local HTTP API; 0 turns it off.
        api_token: What applications must send as a bearer token; none is asked for if left out.
        api_waiting: Most requests that wait while a text is being written.
    """

    model_config = SettingsConfigDict(env_prefix="FLEET_DEVICE_", env_nested_delimiter="__", extra="forbid")

    fleet: Name = "fleet"
    device: Name = "device-1"
    broker: BrokerSettings = Field(default_factory=BrokerSettings)
    model: str = "smollm2-135m:Q4_0"
    models: Path = Field(default_factory=lambda: Path(os.environ.get("FLEET_MODELS", "models")))
    drafter: DrafterName = "llama.cpp"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    context: Annotated[int, Field(ge=16, le=1 << 20)] = 2048
    gpu_layers: Annotated[int, Field(ge=0)] = 0
    draft_length: Annotated[int | Literal["auto"], BeforeValidator(read_draft_length)] = 4
    ahead: Annotated[bool | Literal["auto"], BeforeValidator(read_ahead)] = AUTO
    mode: Mode = Mode.RESIDUAL
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 0.7
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] = 50
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] | None = None
    max_new_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 256
    open_s: Annotated[float, Field(gt=0)] = 15.0
    resume_s: Annotated[float, Field(gt=0)] = 120.0
    verdict_s: Annotated[float, Field(gt=0)] = 10.0
    drain_s: Annotated[float, Field(ge=0)] = 10.0
    api_port: Annotated[int, Field(ge=0, le=65535)] = 8321
    api_token: Annotated[SecretStr, Field(min_length=1)] | None = None
    api_waiting: Annotated[int, Field(ge=0, le=1000)] = 8

    def policy(self) -> SamplingPolicy:
        """Return the sampling policy, with a fresh seed unless one is set."""
        return SamplingPolicy(
            mode=self.mode,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=random_seed() if self.seed is None else self.seed,
        )
