"""Edge settings, from flags, the environment (`FLEET_EDGE_…`, nested with `__`) and TOML."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from dssd.downlink import Form
from fleet_common.fields import Settings, setting
from fleet_common.metrics.settings import MetricsSettings
from fleet_common.mqtt.settings import BrokerSettings
from fleet_edge.guard.quotas import QuotaSettings
from fleet_edge.guard.strikes import FenceSettings
from fleet_edge.store.retention import RETENTION
from fleet_edge.store.token_kinds import StoreText
from schemas.bounds import MAX_DRAFT, MAX_TOKENS, MAX_WINDOW, SESSIONS_PER_DEVICE
from schemas.names import Name

AUTO: Final = "auto"
"""The engine is the faster one, measured on this machine, of those that are installed and can serve the target."""

VERIFIERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "llama.cpp": "fleet_edge.verifiers.llama_cpp.loader:load",
        "torch": "fleet_edge.verifiers.packed.verifier:load",
        "remote": "fleet_edge.verifiers.remote.verifier:load",
    }
)
"""By engine, the function that takes the edge's settings and returns the verifier."""

if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[(AUTO, *VERIFIERS)]

# What Python's timedelta holds is less than what a number does.
_MOST_DAYS = 36_500


class PrefixSharing(StrEnum):
    """Whose computed prefixes a sequence may take over."""

    ALL = "all"
    DEVICE = "device"
    OFF = "off"


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


class EdgeSettings(Settings):
    """All settings of one edge."""

    variable_prefix: ClassVar[str] = "FLEET_EDGE_"

    fleet: Name = setting("fleet", "Name of the fleet.")
    edge: Name = setting("edge-1", "Name of this edge; its identity at the broker.")
    broker: BrokerSettings = Field(default_factory=BrokerSettings)
    target: str = setting(
        "models/smollm2-135m/target",
        "Large model: a folder, a Hugging Face repository id, or a GGUF file.",
        min_length=1,
    )
    engine: EngineName = setting(
        AUTO,
        "Engine that the large model runs in; `auto` is the faster one on this machine, measured once, of torch and "
        "llama.cpp, where both are installed and can serve it (docs/engines.md).",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Number format of the large model; `auto` is bfloat16 where that is fast, else float32."
    )
    torch_device: str = setting(
        "auto",
        "What the large model runs on, as torch names it (`cpu`, `cuda`, `cuda:1`); `auto` is a GPU if there is one.",
        min_length=1,
    )
    threads: int = setting(0, "Threads of the engine; 0 leaves it to the engine.", ge=0, le=1024)
    gpu_layers: int = setting(
        -1, "Layers that llama.cpp puts on a GPU, where it was built for one; -1 is all.", rare=True, ge=-1
    )
    batch_invariant: bool = setting(
        True,  # noqa: FBT003 - a default
        "Use kernels whose results do not depend on the batch, so that seeded requests repeat (coupled mode or greedy, "
        "llama.cpp on a CPU). Without it, edge-only decoding of such requests is up to 1.6 times as fast.",
        rare=True,
    )
    context: int = setting(
        0,
        "Most tokens of a text and its prompt with the engine llama.cpp, which keeps room for that many for each text; "
        "0 is the model's own, or fewer where `kv_bytes` holds few such texts.",
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
    spool: Path = setting(Path("fleet-spool"), "Folder for records while the database is away.")
    form: Form = setting(Form.AUTO, "How the target distribution goes down after a rejection.")
    padding: int = setting(
        0,
        "Verdicts are filled up to a multiple of this, so that their sizes tell less of the text; 0 leaves them as "
        "they are.",
        unit="bytes",
        rare=True,
        ge=0,
        le=1 << 16,
    )
    piece_s: float = setting(
        0.1,
        "Longest time for which tokens that the edge writes by itself wait to be sent with those that follow; 0 sends "
        "each at once.",
        unit="seconds",
        rare=True,
        ge=0,
        le=10,
    )
    grammars: bool = setting(
        True,  # noqa: FBT003 - a default
        "Serve generations that follow a grammar (`response_format`, `tools`, `grammar`); without it they are refused.",
    )
    max_guess: int = setting(
        1,
        "Most tokens that the edge guesses in one step of a text that it writes by itself, from what the text and its "
        "prompt have shown; they change no text, 1 guesses where that costs nothing, more where it seems to pay, and 0 "
        "never.",
        unit="tokens",
        rare=True,
        ge=0,
        le=16,
    )
    verdict_ms: float = setting(
        0.0,
        "Goal: longest mean time from a draft's arrival to its verdict, or between two tokens that the edge writes by "
        "itself; new sessions that would make the edge miss it are refused with a time to come back, 0 refuses none.",
        unit="milliseconds",
        rare=True,
        ge=0,
        le=60_000,
    )
    max_draft: int = setting(16, "Most tokens in one draft.", unit="tokens", rare=True, ge=0, le=MAX_DRAFT)
    window: int = setting(4, "Most drafts of one session under way.", unit="drafts", rare=True, ge=1, le=MAX_WINDOW)
    max_new_tokens: int = setting(4096, "Most tokens of one text.", unit="tokens", rare=True, ge=1, le=MAX_TOKENS)
    max_sessions: int = setting(4096, "Most open sessions.", unit="sessions", rare=True, ge=1, le=60_000)
    max_sessions_per_device: int = setting(
        SESSIONS_PER_DEVICE, "Most open sessions of one device.", unit="sessions", rare=True, ge=1, le=60_000
    )
    lease_s: float = setting(60.0, "Silence after which a session is lost.", unit="seconds", rare=True, gt=0)
    grace_s: float = setting(
        15.0,
        "Time that a device has to come back after the broker has declared it gone.",
        unit="seconds",
        rare=True,
        ge=0,
    )
    drain_s: float = setting(
        10.0, "Time that open sessions have to end when the edge is asked to stop.", unit="seconds", rare=True, ge=0
    )
    step_tokens: int = setting(512, "Most new tokens in one forward pass.", unit="tokens", rare=True, ge=1, le=1 << 20)
    background_share: float = setting(
        0.05,
        "Share of the large model's time for prompts out of proportion to what is written, and for drafts that are "
        "hardly ever accepted, while others are verified.",
        rare=True,
        gt=0,
        le=1,
    )
    prefill_chunk: int = setting(
        128, "Most tokens of prompts in a pass that also verifies.", unit="tokens", rare=True, ge=1, le=1 << 20
    )
    gather_share: float = setting(
        0.5,
        "Longest delay of a step for drafts that are about to come, as a fraction of the step.",
        rare=True,
        ge=0,
        le=1,
    )
    kv_bytes: int = setting(
        2 << 30,
        "Most memory for keys and values; it bounds how long a text can be.",
        unit="bytes",
        rare=True,
        ge=1 << 20,
        le=1 << 50,
    )
    prefix_sharing: PrefixSharing = setting(
        PrefixSharing.DEVICE,
        "Whose computed prompts a session may go on from: of its own device, of all devices, which lets each find out "
        "by timing what others have asked, or none (`off`).",
        rare=True,
    )
    shared_prefixes: tuple[str, ...] = setting(
        (),
        "Beginnings of prompts that all devices share, with `prefix_sharing` `device` too, as the model reads them; "
        "`fleet device prefix` writes one from a system prompt.",
        rare=True,
        in_flags=False,
    )
    trace_share: float = setting(1.0, "Fraction of the sessions whose every round is logged.", rare=True, ge=0, le=1)
    keep_rounds_days: float = setting(
        RETENTION.rounds_days, "How long logged rounds are kept.", unit="days", rare=True, gt=0, le=_MOST_DAYS
    )
    store_text: StoreText = setting(
        StoreText.NONE,
        "What is stored of the texts in the session log: `none`; `hash`, how each token came about and a hash of the "
        "text; `full`, the text too; never prompts (docs/texts.md).",
        rare=True,
    )
    keep_texts_days: float = setting(
        RETENTION.texts_days, "How long stored texts are kept.", unit="days", rare=True, gt=0, le=_MOST_DAYS
    )
    keep_sessions_days: float = setting(
        RETENTION.sessions_days, "How long sessions are kept.", unit="days", rare=True, gt=0, le=_MOST_DAYS
    )
    keep_hourly_days: float = setting(
        RETENTION.hourly_days, "How long totals by the hour are kept.", unit="days", rare=True, ge=1, le=_MOST_DAYS
    )
    keep_daily_days: float = setting(
        RETENTION.daily_days,
        "How long totals by the day are kept; those by the month stay.",
        unit="days",
        rare=True,
        ge=1,
        le=_MOST_DAYS,
    )
    backup_folder: Path | None = setting(
        None, "Folder for regular backups of a SQLite session log; none without it.", rare=True
    )
    backup_every_h: float = setting(24.0, "Between backups.", unit="hours", rare=True, ge=0.25, le=8760)
    backup_keep: int = setting(14, "Backups kept, the latest.", rare=True, ge=1, le=10_000)
    log_format: Literal["plain", "json"] = setting(
        "plain",
        "How the log is written: `plain` lines, or `json`, an object a line, with what is below a warning too.",
        rare=True,
    )
    alerts: Path | None = setting(
        None,
        "TOML file of alert settings (docs/alerts.md); with it this edge looks for alerts unless another does.",
        rare=True,
    )
    remote: RemoteSettings = Field(default_factory=RemoteSettings)
    quotas: QuotaSettings = Field(default_factory=QuotaSettings)
    fence: FenceSettings = Field(default_factory=FenceSettings)
    dashboard: str = setting(
        "",
        "Address and port of a dashboard within the edge, such as 127.0.0.1:8400, or empty for none; all else of it is "
        "set as for `fleet admin serve` (`FLEET_DASHBOARD_…`).",
    )
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)
