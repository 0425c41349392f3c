"""Quotas: how much of an edge one device may use, from the configuration, for all devices or for those of a label."""

import fnmatch
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from fleet_common.settings import setting
from schemas.names import Name

_MOST: Final = 1e9


def _rate(default: float, meaning: str, unit: str) -> Any:  # noqa: ANN401 - as `setting`
    return setting(default, meaning, unit=unit, in_flags=False, gt=0, le=_MOST)


class Quotas(BaseModel):
    """How much one device may use. Rates are averages: a device that was quiet may use some of it at once."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    drafts_per_s: float = _rate(200.0, "Maximum drafts per device.", "drafts per second")
    opens_per_min: float = _rate(
        120.0, "Maximum sessions opened per device, three quarters of them at once.", "sessions per minute"
    )
    states_per_min: float = _rate(120.0, "Maximum states published per device.", "messages per minute")
    uplink_bytes_per_s: float = _rate(262_144.0, "Maximum bytes sent per device, as packets.", "bytes per second")
    repeat_bytes_per_s: float = _rate(262_144.0, "Maximum bytes of repeated verdicts per device.", "bytes per second")
    prompt_tokens_per_min: float = _rate(
        60_000.0, "Maximum tokens per device in prompts and resumed sessions.", "tokens per minute"
    )
    new_tokens_per_min: float = _rate(12_000.0, "Maximum tokens generated per device.", "tokens per minute")
    grammar_s_per_min: float = _rate(10.0, "Maximum time to compile grammars per device.", "seconds per minute")
    sample_requests: int = setting(
        32,
        "Maximum requests for further samples after one rejection.",
        unit="requests",
        in_flags=False,
        ge=1,
        le=1 << 20,
    )
    top_k: int = setting(
        1024,
        "Largest `top_k` of a policy; 0 (whole vocabulary) is always allowed.",
        unit="tokens",
        in_flags=False,
        ge=1,
        le=1 << 21,
    )
    kv_share: float = setting(
        0.5,
        "Maximum share of the memory for keys and values per device while others need some.",
        in_flags=False,
        gt=0,
        le=1,
    )


class LabelSettings(Quotas):
    """Quotas of the devices of a label: those given here stand in place of everybody's."""

    devices: Annotated[tuple[str, ...], Field(min_length=1)]

    def concerns(self, device: str) -> bool:
        """Whether a device has the label: its name is among `devices`, or matches a pattern there (`press-*`)."""
        return any(fnmatch.fnmatchcase(device, pattern) for pattern in self.devices)


class QuotaSettings(Quotas):
    """The section `[quotas]`: everybody's, and those of labels."""

    labels: dict[Name, LabelSettings] = setting(
        dict,
        "Quotas of some devices: `[quotas.labels.NAME]` with `devices` (names or patterns) and quotas.",
        in_flags=False,
    )

    def of(self, device: str) -> Quotas:
        """Return the quotas of a device: of the first label that it has, and everybody's where that says nothing."""
        everybody = self.model_dump(exclude={"labels"})
        for label in self.labels.values():
            if label.concerns(device):
                return Quotas(**everybody | label.model_dump(exclude_unset=True, exclude={"devices"}))
        return Quotas(**everybody)
