"""Settings of an administrator's programs, from flags, the environment (`FLEET_ADMIN_…`, nested with `__`) and TOML."""

from typing import TYPE_CHECKING, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field

from fleet_common.mqtt.settings import BrokerSettings
from fleet_common.settings import Settings, setting
from schemas.names import Name

if TYPE_CHECKING:
    from fleet_edge.counters import SegmentCounters

DEFAULT_DB: Final = "sqlite:///fleet.sqlite3"

_MILLION: Final = 1e6


class PriceList(BaseModel):
    """What tokens and payload cost; nothing is computed without a price."""

    model_config = ConfigDict(extra="forbid")

    currency: str = setting("EUR", "Currency of the prices.", in_flags=False, min_length=1, max_length=8)
    million_tokens: float = setting(0.0, "Price of a million tokens.", in_flags=False, ge=0)
    megabyte: float = setting(
        0.0, "Price of a megabyte of payload, both ways. Packets are 3 to 13 times as large.", in_flags=False, ge=0
    )

    def __bool__(self) -> bool:
        return bool(self.million_tokens or self.megabyte)

    def cost(self, counted: "SegmentCounters") -> float:
        megabytes = (counted.uplink_bytes + counted.downlink_bytes) / _MILLION
        return self.million_tokens * counted.tokens / _MILLION + self.megabyte * megabytes


class AdminSettings(Settings):
    """Where an administrator's programs find the fleet, and who they are there."""

    variable_prefix: ClassVar[str] = "FLEET_ADMIN_"

    fleet: Name = setting("fleet", "Name of the fleet.")
    name: Name = setting("monitor", "Name of this monitor; its identity at the broker, used by no other program.")
    db: str = setting(
        DEFAULT_DB,
        "URL of the session log, unless `--db` or FLEET_DB names one.",
        in_flags=False,
        in_errors=False,
        min_length=1,
    )
    broker: BrokerSettings = Field(default_factory=BrokerSettings)
    prices: PriceList = Field(default_factory=PriceList)
