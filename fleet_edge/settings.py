"""Edge's configuration: TOML, environment (`FLEET_EDGE_…`, nested with `__`) and flags."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from dssd.downlink import Form
from fleet_edge.verifiers.registry import VERIFIERS
from fleet_link.settings import BrokerSettings
from schemas.bounds import MAX_DRAFT, MAX_TOKENS
from schemas.names import Name

__all__ = ["EdgeSettings"]

if TYPE_CHECKING:
    VerifierName = str
else:
    VerifierName = Literal[tuple(VERIFIERS)]


class EdgeSettings(BaseSettings):
    """All settings of one edge.

    Attributes:
        fleet: The fleet's name.
        edge: This edge's name; its identity at the broker.
        broker: Where the broker is.
        target: The large model: a local folder, a Hugging Face repo id, or a GGUF file.
        verifier: The engine that it runs in.
        dtype: Of its weights in memory; `auto` is bfloat16 where the processor is fast at it.
        torch_device: `cpu`, `cuda`, `cuda:1`, …
        threads: Of torch; 0 leaves it to torch.
        db: SQLAlchemy URL of the session log.
        spool: Folder for records while the database is away.
        max_draft: Most tokens in one draft.
        window: Most drafts of one session under way.
        max_new_tokens: Most tokens of one text.
        max_sessions: Most open sessions.
        max_sessions_per_device: Most open sessions of one device.
        lease_s: Seconds of silence after which a session is lost.
        grace_s: Seconds that a device has to come back after the broker has declared it gone.
        drain_s: Seconds that open sessions have to end when the edge is asked to stop.
        step_tokens: Most new tokens in one forward pass.
        prefill_chunk: Most tokens of one prompt in a pass that also verifies.
        gather_share: Longest hold of a step for drafts that are about to come, as a fraction of a step.
        kv_bytes: Memory for keys and values.
        form: How p goes down after a rejection.
        trace_share: Fraction of sessions whose every round is logged.
        keep_rounds_days: How long traced rounds are kept.
        keep_sessions_days: How long sessions are kept.
    """

    model_config = SettingsConfigDict(env_prefix="FLEET_EDGE_", env_nested_delimiter="__", extra="forbid")

    fleet: Name = "fleet"
    edge: Name = "edge-1"
    broker: BrokerSettings = Field(default_factory=BrokerSettings)
    target: str = "models/smollm2-135m/target"
    verifier: VerifierName = "packed"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    torch_device: str = "cpu"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    db: str = "sqlite:///fleet.sqlite3"
    spool: Path = Path("fleet-spool")
    max_draft: Annotated[int, Field(ge=0, le=MAX_DRAFT)] = 16
    window: Annotated[int, Field(ge=1, le=64)] = 4
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 4096
    max_sessions: Annotated[int, Field(ge=1, le=60_000)] = 4096
    max_sessions_per_device: Annotated[int, Field(ge=1)] = 8
    lease_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    grace_s: Annotated[float, Field(ge=0)] = 15.0
    drain_s: Annotated[float, Field(ge=0)] = 10.0
    step_tokens: Annotated[int, Field(ge=1)] = 512
    prefill_chunk: Annotated[int, Field(ge=1)] = 128
    gather_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    kv_bytes: Annotated[int, Field(ge=1 << 20)] = 2 << 30
    form: Form = Form.AUTO
    trace_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    keep_rounds_days: Annotated[float, Field(gt=0)] = 7.0
    keep_sessions_days: Annotated[float, Field(gt=0)] = 365.0
