"""Device settings, from flags, the environment (`FLEET_DEVICE_…`, nested with `__`) and TOML."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from fleet_common.host import state_folder
from fleet_common.metrics import ListenAddress
from fleet_common.mqtt.settings import BrokerSettings
from fleet_common.settings import Settings, setting
from schemas.codec import MAX_DRAFT_BYTES
from schemas.fields import MAX_DRAFT, MAX_TOKENS, SESSIONS_PER_DEVICE
from schemas.names import Name, is_probe
from schemas.policy import MAX_SEED, MAX_TOP_K, Mode, SamplingPolicy, random_seed

INTERRUPTION_S: Final = 20.0
"""Longest interruption that a request rides out by default: a restart of broker or edge that takes 15 s, and the
reconnection of both ends, each of which tries again at least every 4 s."""

_ALONE_AFTER_S: Final = 2.0
"""Shorter for the policy `local`, which has an alternative to waiting."""


class ReasoningEffort(StrEnum):
    """Length of a model's thinking, by OpenAI's names."""

    NONE = "none"
    MINIMAL = "minimal"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    XHIGH = "xhigh"


class OfflinePolicy(StrEnum):
    FAIL = "fail"  # the request ends with an error
    WAIT = "wait"  # it continues when an edge is back
    LOCAL = "local"  # the draft model continues alone; its output is marked as unverified
    OTHER_TARGET = "other-target"  # an edge with another target model continues, likewise marked; else as `wait`


@dataclass(frozen=True, slots=True, kw_only=True)
class Outages:
    """Policy of a request in an outage, and when it applies.

    Attributes:
        after_s: Seconds without a broker, or without an edge that is online, after which the policy applies; None
            depends on the policy.
        answer_s: Seconds of silence of an online edge after which it applies.
    """

    policy: OfflinePolicy = OfflinePolicy.FAIL
    after_s: float | None = None
    answer_s: float = INTERRUPTION_S

    @property
    def absence_s(self) -> float:
        if self.after_s is not None:
            return self.after_s
        return _ALONE_AFTER_S if self.policy is OfflinePolicy.LOCAL else INTERRUPTION_S


MODEL_DRAFTER: Final = "llama.cpp"
"""The drafter with a model of its own, which can also generate without an edge."""

NO_DRAFTER: Final = "none"

DRAFTERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        MODEL_DRAFTER: "fleet_device.drafters.llama_cpp:load",
        "suffix": "fleet_device.drafters.suffix:load",
        NO_DRAFTER: "fleet_device.drafters.without_model:load_none",
    }
)
"""Functions that take the device's settings and return the drafter, by name. The first is the default."""

if TYPE_CHECKING:
    DrafterName = str
else:
    DrafterName = Literal[tuple(DRAFTERS)]

AUTO: Final = "auto"

MAX_TEMPERATURE: Final = 2.0


class Goal(StrEnum):
    """Quantity that the choice of plans saves: time, energy or traffic."""

    SPEED = "speed"
    ENERGY = "energy"
    BYTES = "bytes"


_figure: Final = partial(setting, 0.0, rare=True, in_flags=False, ge=0)


class Power(BaseModel):
    """Power and energy of drafting, waiting and sending, to estimate joules per token."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    drafting_w: float = _figure("Power while the draft model computes; 0 if unknown.", unit="watts", le=10_000)
    idle_w: float = _figure("Power while waiting for the edge.", unit="watts", le=10_000)
    joules_per_mb: float = _figure("Energy of radio or modem per megabyte.", unit="joules", le=100_000)

    @property
    def known(self) -> bool:
        return self.drafting_w > 0.0


MemoryBudget = Annotated[int, Field(ge=1, le=1 << 20)] | Literal["auto"]
DraftLength = Annotated[int, Field(ge=0, le=MAX_DRAFT)] | Literal["auto"]

_DRAFT_SEQUENCES: Final = 2
"""A small device drafts for one request while another waits for its verdict; more would share the same CPU."""


class DeviceSettings(Settings):
    """All settings of one device."""

    variable_prefix: ClassVar[str] = "FLEET_DEVICE_"

    fleet: Name = setting("fleet", "Name of the fleet.")
    device: Name = setting("device-1", "Name of this device; its identity at the broker.")
    broker: BrokerSettings = Field(default_factory=BrokerSettings)
    model: str = setting(
        "smollm2-135m:Q4_0",
        "Draft model: a GGUF file, a file of a Hugging Face repository (`owner/name:file.gguf`), or "
        "`NAME:QUANTIZATION` for `NAME/QUANTIZATION.gguf` in `models_dir`.",
        min_length=1,
    )
    target: str = setting(
        "", "Target model of requests that name none, by the name that its edges have; empty for any edge's."
    )
    models_dir: Path = setting(Path("models"), "Folder of the models that are named as `NAME:QUANTIZATION`.")
    drafter: DrafterName = setting(
        "llama.cpp",
        "Drafts from the model, earlier output and this request (`suffix`), or nothing (edge-only). All but the "
        "first need only the vocabulary of the model's file.",
    )
    suffix: bool = setting(
        False,  # noqa: FBT003 - a default
        "Whether to draft also from earlier output and this request, where that promises more tokens/s than the model.",
    )
    target_vocabulary: Path | None = setting(
        None,
        "Vocabulary of the target, if the draft model has another one: a file made by `fleet models vocabulary`. "
        "Drafts use the common tokens.",
    )
    threads: int = setting(1, "Threads of llama.cpp.", ge=1, le=1024)
    context: int = setting(
        2048,
        "Maximum tokens that the draft model holds; fewer if memory is short. Longer requests go on edge-only.",
        unit="tokens",
        rare=True,
        ge=16,
        le=1 << 20,
    )
    memory_mb: MemoryBudget = setting(
        AUTO,
        "Memory limit for the draft model's keys, values and buffers, without weights; context and batch shrink "
        "to fit. `auto`: half of the free memory.",
        unit="megabytes",
        rare=True,
    )
    requests_at_once: int = setting(
        SESSIONS_PER_DEVICE,
        "Maximum number of running requests; beyond the edge's `max_sessions_per_device`, they wait. The draft "
        "model serves 2; others are edge-only and take no memory. With `edge_only = false` each has its own context.",
        unit="requests",
        ge=1,
        le=64,
    )
    gpu_layers: int = setting(0, "Layers of the draft model on a GPU.", unit="layers", rare=True, ge=0, le=10_000)
    draft_length: DraftLength = setting(
        AUTO, "Tokens per draft; with `auto` the device measures and chooses.", unit="tokens"
    )
    ahead: bool | Literal["auto"] = setting(
        AUTO,
        "Whether to draft before the last verdict arrives. `auto` chooses if `draft_length` is `auto`, and waits "
        "if it is fixed.",
    )
    edge_only: bool | Literal["auto"] = setting(
        AUTO,
        "Whether to use edge-only decoding. `auto` chooses if `draft_length` is `auto`; otherwise only requests "
        "that find the draft model busy are edge-only.",
    )
    goal: Goal = setting(
        Goal.SPEED,
        "What `auto` saves per token.",
    )
    power: Power = Field(default_factory=Power)
    mode: Mode = setting(Mode.RESIDUAL, "How drafts are verified.")
    padding: int = setting(
        0,
        "Pad drafts to a multiple of this size, so that sizes reveal less; 0 is off.",
        unit="bytes",
        rare=True,
        ge=0,
        le=MAX_DRAFT_BYTES,
    )
    temperature: float = setting(0.7, "Sampling temperature; 0 is greedy.", ge=0, le=MAX_TEMPERATURE)
    top_k: int = setting(50, "Number of most likely tokens to keep; 0 keeps all.", unit="tokens", ge=0, le=MAX_TOP_K)
    top_p: float = setting(0.95, "Probability mass to keep; 1 keeps all.", gt=0, le=1)
    seed: int | None = setting(
        None, "Seed of all random decisions; by default a new one per request.", ge=0, le=MAX_SEED
    )
    max_new_tokens: int = setting(256, "Maximum tokens of a request's output.", unit="tokens", ge=0, le=MAX_TOKENS)
    reasoning_effort: ReasoningEffort | None = setting(
        None,
        "How long a model thinks whose chat template can set it; `none` turns thinking off. By default as the template "
        "says.",
    )
    thinking_token_budget: int | None = setting(
        None,
        "Most tokens of the thinking before an answer, which then follows; by default only `max_new_tokens` bounds it.",
        unit="tokens",
        ge=0,
        le=MAX_TOKENS,
    )
    offline: OfflinePolicy = setting(
        OfflinePolicy.FAIL,
        "When no edge answers: `fail` ends the request with an error, `wait` continues when an edge is back, "
        "`local` continues with the draft model, marked as unverified, `other-target` with an edge that has another "
        "target model, likewise marked.",
    )
    offline_s: float | None = setting(
        None,
        "Time without a broker or an online edge after which `offline` applies; by default 20, but 2 with `local`.",
        unit="seconds",
        rare=True,
        ge=0,
    )
    answer_s: float = setting(
        INTERRUPTION_S,
        "Silence of an online edge after which `offline` applies, and the longest wait for a quota. After half of it "
        "an unanswered draft is repeated or another edge is asked.",
        unit="seconds",
        rare=True,
        gt=0,
    )
    drain_s: float = setting(
        60.0, "Time for running requests to end when the device stops.", unit="seconds", rare=True, ge=0
    )
    applications: Path | None = setting(
        None,
        "File of the applications that may use the local API, with keys and quotas, made by `fleet device app`; "
        "without it every program on the device may.",
        rare=True,
    )
    api_listen: str = setting(
        "127.0.0.1:8321",
        "Address and port of the local HTTP API, or the path of a Unix socket; beyond loopback only with "
        "`applications`. Empty for none.",
    )
    api_hosts: str = setting(
        "",
        "Names, separated by commas, under which containers and other machines may call the API: the URL's host.",
        rare=True,
    )
    api_certificate: Path | None = setting(
        None, "Server certificate, its chain and its key (PEM, one file): turns the API's port into HTTPS.", rare=True
    )
    api_page: bool = setting(
        True,  # noqa: FBT003 - a default
        "Serve a page at `/` of the API, to try the device with a chat.",
        rare=True,
    )
    api_waiting: int = setting(8, "Maximum number of waiting requests.", unit="requests", rare=True, ge=0, le=1000)

    steering: bool = setting(
        True,  # noqa: FBT003 - a default
        "Whether an administrator may change settings and send commands remotely.",
    )
    state_dir: Path | None = setting(
        None,
        "Folder that keeps remote settings, and counts of requests without an edge; by default `STATE_DIRECTORY`, "
        "`$XDG_STATE_HOME/dssd-fleet`, or `~/.local/state/dssd-fleet`.",
        rare=True,
    )
    update_dir: Path | None = setting(
        None, "Folder that the service shares with its updater; without it, no release can be set remotely.", rare=True
    )
    log_format: Literal["plain", "json"] = setting(
        "plain",
        "Format of the log: `plain` lines, or `json`, one object per line, including messages below a warning.",
        rare=True,
    )

    @field_validator("device")
    @classmethod
    def _counted(cls, device: str) -> str:
        if is_probe(device):
            raise ValueError("names that begin with 'probe-' are those of self-tests; choose another for a device")
        return device

    # Declared after `applications`, which it depends on.
    @field_validator("api_listen")
    @classmethod
    def _protected(cls, listen: str, seen: ValidationInfo) -> str:
        address = _api_address(listen)
        beyond = isinstance(address, ListenAddress) and not address.loopback
        if beyond and seen.data.get("applications", listen) is None:
            raise ValueError(
                "it must be a loopback address as long as applications have no keys, since other machines reach this "
                "one; give each a key with 'fleet device app add', and name their file in 'applications'"
            )
        return listen

    @property
    def api_address(self) -> ListenAddress | Path | None:
        """Where the API listens; None if it is turned off."""
        return _api_address(self.api_listen)

    @property
    def draft_sequences(self) -> int:
        """Most sequences of the draft model; further requests use edge-only decoding.

        A drafter without a model has one for each request, since they take almost no memory.
        """
        if self.edge_only is False or self.drafter != "llama.cpp":
            return self.requests_at_once
        return min(self.requests_at_once, _DRAFT_SEQUENCES)

    def state_file(self, ending: str) -> Path | None:
        """Return a file of this device in the state folder; None for a user without a home."""
        folder = state_folder() if self.state_dir is None else self.state_dir.expanduser()
        return None if folder is None else folder / f"{self.fleet}.{self.device}{ending}"

    def outages(self) -> Outages:
        """Combine the settings of requests that no edge answers."""
        return Outages(policy=self.offline, after_s=self.offline_s, answer_s=self.answer_s)

    def policy(self) -> SamplingPolicy:
        """Return the sampling policy, with a fresh seed unless one is set."""
        return SamplingPolicy(
            mode=self.mode,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=random_seed() if self.seed is None else self.seed,
        )


def _api_address(text: str) -> ListenAddress | Path | None:
    if not text:
        return None
    if text.startswith("/"):
        return Path(text)
    try:
        return ListenAddress.read(text)
    except ValueError:
        raise ValueError(
            "it must be an address and a port, such as 127.0.0.1:8321, or the absolute path of a Unix socket"
        ) from None
