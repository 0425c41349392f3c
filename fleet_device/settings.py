"""Device settings, from flags, the environment (`FLEET_DEVICE_…`, nested with `__`) and TOML."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

from pydantic import Field, SecretStr, TypeAdapter, ValidationError, field_validator

from fleet_common.fields import Settings, setting
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.offline import INTERRUPTION_S, OfflinePolicy, Outages
from schemas.bounds import MAX_DRAFT, MAX_TOKENS, MAX_WINDOW, SESSIONS_PER_DEVICE
from schemas.codec import MAX_DRAFT_BYTES
from schemas.names import Name
from schemas.policy import MAX_SEED, MAX_TOP_K, Mode, SamplingPolicy, random_seed

MODEL_DRAFTER: Final = "llama.cpp"
"""The one with a model of its own, which can also write a text alone."""

NO_DRAFTER: Final = "none"

DRAFTERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        MODEL_DRAFTER: "fleet_device.drafters.llama_cpp:load",
        "suffix": "fleet_device.drafters.suffix.drafter:load",
        "prompt-lookup": "fleet_device.drafters.prompt_lookup:load",
        NO_DRAFTER: "fleet_device.drafters.none:load",
    }
)
"""By name, the function that takes the device's settings and returns the drafter. The first is the default."""

if TYPE_CHECKING:
    DrafterName = str
else:
    DrafterName = Literal[tuple(DRAFTERS)]

AUTO: Final = "auto"

MAX_TEMPERATURE: Final = 2.0
"""Highest temperature that an application may ask for, as in OpenAI's API; the wire allows more."""


class Truncate(StrEnum):
    """What is done with a prompt that is too long.

    Attributes:
        REFUSE: It is refused.
        START: Its start is left out.
        MIDDLE: Its middle is left out.
    """

    REFUSE = "refuse"
    START = "start"
    MIDDLE = "middle"


LogLevel = Literal["debug", "info", "warning", "error"]
MemoryBudget = Annotated[int, Field(ge=1, le=1 << 20)] | Literal["auto"]
DraftLength = Annotated[int, Field(ge=0, le=MAX_DRAFT)] | Literal["auto"]

_DRAFT_SEQUENCES: Final = 2
"""A small device drafts for one request while another waits for its verdict; more would share the same processor."""

_DRAFT_LENGTH: Final[TypeAdapter[int | Literal["auto"]]] = TypeAdapter(DraftLength)


def read_draft_length(value: object) -> int | Literal["auto"]:
    """Read a draft length.

    Raises:
        ValueError: It is none; the text says what one is.
    """
    try:
        return _DRAFT_LENGTH.validate_python(value)
    except ValidationError:
        raise ValueError(f"a draft has 0 to {MAX_DRAFT} tokens, or {AUTO!r} lets the device choose") from None


class DeviceSettings(Settings):
    """All settings of one device."""

    variable_prefix: ClassVar[str] = "FLEET_DEVICE_"

    fleet: Name = setting("fleet", "Name of the fleet.")
    device: Name = setting("device-1", "Name of this device; its identity at the broker.")
    broker: BrokerSettings = Field(default_factory=BrokerSettings)
    model: str = setting(
        "smollm2-135m:Q4_0",
        "Draft model: a name made by `fleet models prepare`, a GGUF file, or a file of a Hugging Face repository "
        "(`owner/name:file.gguf`).",
        min_length=1,
    )
    models_dir: Path = setting(Path("models"), "Folder of the prepared models.")
    drafter: DrafterName = setting(
        "llama.cpp",
        "What drafts: the model, `suffix`, which repeats what this device has written before and what the text has "
        "said, `prompt-lookup`, which repeats only the latter, or `none`, which has the edge write; all but the first "
        "need only the vocabulary of the model's file.",
    )
    suffix: bool = setting(
        False,  # noqa: FBT003 - a default
        "Whether to draft beside the model from what this device has written before and what the text has said, where "
        "that promises more tokens a second.",
    )
    history_mb: int = setting(
        8,
        "Most memory for what this device has written, from which `suffix` drafts; a quarter of it on disk, and 0 "
        "keeps nothing.",
        unit="megabytes",
        rare=True,
        ge=0,
        le=1024,
    )
    history_dir: Path | None = setting(
        None,
        "Folder of what this device has written; left out, one of the device's name in the state folder "
        "(`STATE_DIRECTORY`, `$XDG_STATE_HOME/dssd-fleet`, or `~/.local/state/dssd-fleet`).",
        rare=True,
    )
    target_vocabulary: Path | None = setting(
        None,
        "The target's vocabulary, where the draft model has another: a file made by `fleet models vocabulary`; drafts "
        "are of the tokens that both have.",
    )
    threads: int = setting(1, "Threads of llama.cpp.", ge=1, le=1024)
    context: int = setting(
        2048,
        "Most tokens of a text with its prompt; less where the memory is too small for it.",
        unit="tokens",
        rare=True,
        ge=16,
        le=1 << 20,
    )
    memory_mb: MemoryBudget = setting(
        AUTO,
        "Most memory for the draft model's keys, values and buffers, of all its sequences, in addition to its weights: "
        "context and batch become smaller to fit; `auto` takes half of what is free.",
        unit="megabytes",
        rare=True,
    )
    truncate: Truncate = setting(
        Truncate.REFUSE,
        "What is done with a prompt that is too long for the context: refused, or cut at its start or in its middle; "
        "of a chat the oldest turns are dropped first, and its template stays whole.",
    )
    texts_at_once: int = setting(
        SESSIONS_PER_DEVICE,
        "Most requests that run at once. The draft model serves 2 of them, and further ones use edge-only decoding, "
        "which takes no memory; with `stream = false` each has memory for a context of its own.",
        unit="requests",
        ge=1,
        le=64,
    )
    gpu_layers: int = setting(0, "Layers of the draft model on a GPU.", unit="layers", rare=True, ge=0, le=10_000)
    draft_length: DraftLength = setting(
        AUTO, "Tokens in a draft; `auto` lets the device choose by what it measures.", unit="tokens"
    )
    ahead: bool | Literal["auto"] = setting(
        AUTO,
        "Whether to draft ahead of the verdict; `auto` chooses where `draft_length` is `auto`, and waits where it is "
        "fixed.",
    )
    stream: bool | Literal["auto"] = setting(
        AUTO,
        "Whether to use edge-only decoding instead of verifying drafts; `auto` chooses where `draft_length` is `auto`, "
        "and drafts where it is fixed, except for requests that find the draft model busy (`texts_at_once`).",
    )
    window: int = setting(
        8,
        "Most drafts under way at once, whatever the edge grants.",
        unit="drafts",
        rare=True,
        ge=1,
        le=MAX_WINDOW,
    )
    mode: Mode = setting(Mode.RESIDUAL, "How drafts are verified.")
    padding: int = setting(
        0,
        "Drafts are filled up to a multiple of this, so that their sizes tell less of the text; 0 leaves them as they "
        "are.",
        unit="bytes",
        rare=True,
        ge=0,
        le=MAX_DRAFT_BYTES,
    )
    temperature: float = setting(0.7, "Sampling temperature; 0 is greedy.", ge=0, le=MAX_TEMPERATURE)
    top_k: int = setting(50, "Most likely tokens that are kept; 0 keeps all.", unit="tokens", ge=0, le=MAX_TOP_K)
    top_p: float = setting(0.95, "Probability mass that is kept; 1 keeps all.", gt=0, le=1)
    seed: int | None = setting(
        None, "Seed of all random decisions; left out, each text has a fresh one.", ge=0, le=MAX_SEED
    )
    max_new_tokens: int = setting(256, "Most tokens of a text.", unit="tokens", ge=0, le=MAX_TOKENS)
    open_s: float = setting(
        INTERRUPTION_S, "Longest wait for an edge to answer an Open.", unit="seconds", rare=True, gt=0
    )
    resume_s: float = setting(
        120.0, "Longest wait for an edge to take a session over again.", unit="seconds", rare=True, gt=0
    )
    offline: OfflinePolicy = setting(
        OfflinePolicy.FAIL,
        "What becomes of a text for which no edge answers: `fail` ends it with an error, `wait` goes on as soon as an "
        "edge is back, `local` goes on with the draft model alone and marks what it writes as unverified.",
    )
    rejoin: bool = setting(
        False,  # noqa: FBT003 - a default
        "Whether an edge that is back verifies the rest of a text that went on without one; what is unverified is "
        "replaced if nobody has read it yet, and stands otherwise.",
    )
    offline_s: float | None = setting(
        None,
        "Time without a broker, or without an edge that is online, after which `offline` applies; left out, 20 with "
        "`fail`, which rides out a restart of broker or edge that takes 15 s, and 2 with `local`.",
        unit="seconds",
        rare=True,
        ge=0,
    )
    answer_s: float = setting(
        INTERRUPTION_S,
        "Longest silence of an edge that says it is online, after which `offline` applies; longer than `verdict_s`, so "
        "that another edge is asked first.",
        unit="seconds",
        rare=True,
        gt=0,
    )
    offline_log: Path = setting(
        Path("fleet-unverified.db"),
        "File that keeps, until an edge has logged them, the counts and times of texts written without one.",
        rare=True,
    )
    verdict_s: float = setting(10.0, "Wait before an unanswered draft is repeated.", unit="seconds", rare=True, gt=0)
    drain_s: float = setting(
        10.0, "Time that the open text has to end when the device is asked to stop.", unit="seconds", rare=True, ge=0
    )
    api_port: int = setting(8321, "Port of the local HTTP API; 0 turns it off.", ge=0, le=65535)
    api_token: SecretStr | None = setting(
        None, "Bearer token that applications must send; left out, none is asked for.", rare=True, min_length=1
    )
    applications: Path | None = setting(
        None,
        "File of the applications that may use the local API, each with a key and quotas, as `fleet device app` writes "
        "it; left out, no key is asked for but `api_token`.",
        rare=True,
    )
    api_waiting: int = setting(
        8,
        "Most requests that wait while as many texts are being written as can be at once.",
        unit="requests",
        rare=True,
        ge=0,
        le=1000,
    )

    steering: bool = setting(
        True,  # noqa: FBT003 - a default
        "Whether an administrator may set what this device does, and give it commands, from afar.",
    )
    steering_fixed: str = setting(
        "",
        "Settings that stay as they are configured here, whatever is wanted from afar: names with commas between.",
        rare=True,
    )
    steering_dir: Path | None = setting(
        None,
        "Folder that keeps what was set from afar; left out, one in the state folder (`STATE_DIRECTORY`, "
        "`$XDG_STATE_HOME/dssd-fleet`, or `~/.local/state/dssd-fleet`).",
        rare=True,
    )
    log_level: LogLevel | None = setting(
        None,
        "From which severity on the log is written; left out, `warning`, or `info` with `--verbose`.",
        rare=True,
    )
    log_format: Literal["plain", "json"] = setting(
        "plain",
        "How the log is written: `plain` lines, or `json`, an object a line, with what is below a warning too.",
        rare=True,
    )
    status_texts: int = setting(
        0,
        "Latest texts that the status page shows, to everybody who may use the local API; 0 shows none.",
        unit="texts",
        rare=True,
        ge=0,
        le=100,
    )

    @field_validator("steering_fixed")
    @classmethod
    def _known(cls, names: str) -> str:
        for name in filter(None, map(str.strip, names.split(","))):
            if name not in cls.model_fields and not name.startswith("quota."):
                raise ValueError(f"it must be names of settings with commas between, and none is called {name[:60]!r}")
        return names

    def stays(self) -> frozenset[str]:
        """Return the settings that are not to be set from afar."""
        return frozenset(filter(None, map(str.strip, self.steering_fixed.split(","))))

    @property
    def draft_sequences(self) -> int:
        """Most sequences of the draft model; further requests use edge-only decoding.

        A drafter without a model has one for each request, since they take hardly any memory.
        """
        if self.stream is False or self.drafter != "llama.cpp":
            return self.texts_at_once
        return min(self.texts_at_once, _DRAFT_SEQUENCES)

    def outages(self) -> Outages:
        """Return what a text does when no edge answers."""
        return Outages(
            policy=self.offline,
            rejoin=self.rejoin,
            after_s=self.offline_s,
            answer_s=self.answer_s,
        )

    def policy(self) -> SamplingPolicy:
        """Return the sampling policy, with a fresh seed unless one is set."""
        return SamplingPolicy(
            mode=self.mode,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=random_seed() if self.seed is None else self.seed,
        )
