"""Edge settings, from flags, the environment (`FLEET_EDGE_…`, nested with `__`) and TOML."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from fleet_common.metrics import MetricsSettings
from fleet_common.mqtt.settings import BrokerSettings
from fleet_common.settings import Settings, setting
from fleet_edge.limits import QuarantineSettings, QuotaSettings
from fleet_edge.session_log.records import SESSIONS_DAYS
from sampling.downlink import FormName
from schemas.fields import MAX_DRAFT, MAX_TOKENS, MAX_WINDOW, SESSIONS_PER_DEVICE
from schemas.names import Name

AUTO: Final = "auto"
"""The engine is chosen by a rule (`verifiers.registry`)."""

MTP: Final = "mtp"
"""`edge_draft`: the target drafts with a layer of its own (multi-token prediction)."""

VERIFIERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "llama.cpp": "fleet_edge.verifiers.llama_cpp.verifier:load",
        "torch": "fleet_edge.verifiers.torch_engine:load",
        "blocks": "fleet_edge.verifiers.blocks_engine:load",
        "remote": "fleet_edge.verifiers.remote:load",
    }
)
"""By engine, the function that takes the edge's settings and returns the verifier."""

if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[(AUTO, *VERIFIERS)]


class PrefixSharing(StrEnum):
    """Sequences that share computed prefixes: of all devices, of one device, or none."""

    ALL = "all"
    DEVICE = "device"
    OFF = "off"


class KeptIn(StrEnum):
    """Where keys and values survive the process."""

    MEMORY = "memory"
    DISK = "disk"
    NOTHING = "off"


class InferenceServerSettings(BaseModel, extra="forbid", allow_inf_nan=False):
    """Inference server (vLLM) that computes the target model; read where the setting `engine` is `remote`."""

    endpoint: str = setting(
        "",
        "Address of the inference server (vLLM), or of a router or load balancer in front of several: `http://10.0.0.5:8000`.",
    )
    api_key_file: Path | None = setting(
        None, "File with the API key of the inference server; only its owner may read it."
    )
    served_model: str = setting("", "Name of the model at the inference server; optional if it serves one.", rare=True)
    top_logprobs: int = setting(
        50,
        "Log-probabilities requested per position, and the largest `top_k` that devices may use.",
        ge=1,
        le=4096,
    )
    request_s: float = setting(
        5.0,
        "Longest wait for the inference server's response; then it is asked again, for up to three times as long.",
        unit="seconds",
        rare=True,
        gt=0,
        le=600,
    )
    away_s: float = setting(
        5.0,
        "Time without the inference server after which this edge reports itself offline.",
        unit="seconds",
        rare=True,
        ge=0,
        le=3600,
    )

    @property
    def step_s(self) -> float:
        """Longest time of one step, all attempts included."""
        return 3.0 * self.request_s


class EdgeSettings(Settings):
    """All settings of one edge."""

    variable_prefix: ClassVar[str] = "FLEET_EDGE_"

    fleet: Name = setting("fleet", "Name of the fleet.")
    edge: Name = setting("edge-1", "Name of this edge; its identity at the broker.")
    broker: BrokerSettings = Field(default_factory=BrokerSettings)
    target: str = setting(
        "models/smollm2-135m/target-Q8_0.gguf",
        "Large model: a folder, a Hugging Face repository id, or a GGUF file.",
        min_length=1,
    )
    engine: EngineName = setting(
        AUTO,
        "Engine of the large model. `auto` is torch on a GPU, else `blocks` where it serves the model, else llama.cpp "
        "for a GGUF and torch for a folder (docs/engines.md).",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Number format of the large model in torch; `auto` is bfloat16 where that is fast, else float32."
    )
    weight_bits: Literal[4, 8] = setting(
        8,
        "Bits to which the engine `blocks` quantizes weights that are not quantized yet (docs/engines.md).",
        rare=True,
    )
    edge_draft: str = setting(
        "",
        "Small model that drafts for edge-only decoding, next to the target: a GGUF, a folder, or a repository id, "
        "with the target's vocabulary; or `mtp`, a layer of the target's own GGUF (docs/engines.md). The output stays "
        "the same; drafts are made only while they make it faster.",
    )
    threads: int = setting(0, "Threads of the engine; 0 leaves it to the engine.", ge=0, le=1024)
    gpu_layers: int = setting(-1, "Layers that llama.cpp puts on a GPU, if built for one; -1 is all.", rare=True, ge=-1)
    batch_invariant: bool = setting(
        True,  # noqa: FBT003 - a default
        "Make seeded requests (coupled or greedy, llama.cpp on a CPU) repeat in any batch. Without it, their "
        "edge-only decoding is up to 1.6 times as fast.",
        rare=True,
    )
    context: int = setting(
        0,
        "Maximum tokens of prompt and output with llama.cpp, which reserves memory per sequence; 0 is the model's "
        "own limit, or less if `kv_bytes` is small.",
        unit="tokens",
        rare=True,
        ge=0,
        le=MAX_TOKENS,
    )
    db: str = setting(
        "sqlite:///fleet.sqlite3",
        "URL of the session log: `sqlite:///PATH` or `postgresql://USER@HOST/NAME`.",
        in_errors=False,
        min_length=1,
    )
    spool: Path = setting(Path("fleet-spool"), "Folder for records while the database is unavailable.")
    form: FormName = setting(FormName.AUTO, "Form in which the target distribution is sent after a rejection.")
    padding: int = setting(
        0,
        "Pad verdicts to a multiple of this size, so that sizes reveal less; 0 is off.",
        unit="bytes",
        rare=True,
        ge=0,
        le=1 << 16,
    )
    grammars: bool = setting(
        True,  # noqa: FBT003 - a default
        "Serve generations that follow a grammar (`response_format`, `tools`, `grammar`); without it they are refused.",
    )
    max_draft: int = setting(16, "Maximum tokens per draft.", unit="tokens", rare=True, ge=0, le=MAX_DRAFT)
    window: int = setting(4, "Maximum drafts in flight per session.", unit="drafts", rare=True, ge=1, le=MAX_WINDOW)
    max_new_tokens: int = setting(4096, "Maximum tokens of one output.", unit="tokens", rare=True, ge=1, le=MAX_TOKENS)
    max_sessions_per_device: int = setting(
        SESSIONS_PER_DEVICE, "Maximum open sessions per device.", unit="sessions", rare=True, ge=1, le=60_000
    )
    lease_s: float = setting(60.0, "Silence after which a session is lost.", unit="seconds", rare=True, gt=0)
    drain_s: float = setting(
        10.0, "Time for open sessions to end when the edge stops.", unit="seconds", rare=True, ge=0
    )
    kv_bytes: int = setting(
        2 << 30,
        "Memory limit for keys and values; it bounds the length of a sequence.",
        unit="bytes",
        rare=True,
        ge=1 << 20,
        le=1 << 50,
    )
    kv_kept: KeptIn = setting(
        KeptIn.MEMORY,
        "Where keys and values of `blocks` survive a restart, at most a day, so that running requests go on without "
        "being computed again: shared `memory`, `disk` (also after a power cut), or `off`.",
        rare=True,
    )
    prefix_sharing: PrefixSharing = setting(
        PrefixSharing.DEVICE,
        "Whose computed prompts a session may reuse: its own device's, those of all devices (then timing reveals "
        "what others have asked), or none (`off`).",
        rare=True,
    )
    warm_prompts: Path | None = setting(
        None,
        "File of system prompts that `fleet edge run` computes ahead, while no session has work, and keeps for all "
        "devices: on each line a JSON string, or a JSON list of messages (docs/operations.md).",
        rare=True,
    )
    keep_sessions_days: float = setting(
        SESSIONS_DAYS, "Retention of sessions.", unit="days", rare=True, gt=0, le=36_500
    )
    log_format: Literal["plain", "json"] = setting(
        "plain",
        "Format of the log: `plain` lines, or `json`, one object per line, including messages below a warning.",
        rare=True,
    )
    alerts: Path | None = setting(
        None,
        "TOML file of alert settings, with the webhook (docs/alerts.md).",
        rare=True,
    )
    remote: InferenceServerSettings = Field(default_factory=InferenceServerSettings)
    quotas: QuotaSettings = Field(default_factory=QuotaSettings)
    quarantine: QuarantineSettings = Field(default_factory=QuarantineSettings)
    dashboard: str = setting(
        "",
        "Address and port of a dashboard within the edge, such as 127.0.0.1:8400; empty for none. Other settings: "
        "`FLEET_DASHBOARD_…`.",
    )
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)

    @field_validator("warm_prompts")
    @classmethod
    def _usable_warm_prompts(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if path is not None and info.data.get("prefix_sharing") is PrefixSharing.OFF:
            raise ValueError("they are kept as prefixes; set prefix_sharing to device or all")
        if path is not None and info.data.get("engine") == "remote":
            raise ValueError("they are computed by this process; leave them out with the engine remote")
        return path

    @field_validator("weight_bits", mode="before")
    @classmethod
    def _number(cls, bits: object) -> object:
        return int(bits) if isinstance(bits, str) and bits.isdecimal() else bits  # a flag, or a variable
