"""Settings of an administrator's programs, from flags, the environment (`FLEET_ADMIN_…`, nested with `__`) and TOML."""

from typing import ClassVar, Final

from pydantic import Field

from fleet_common.mqtt.settings import BrokerSettings
from fleet_common.settings import Settings, setting
from schemas.names import Name

DEFAULT_DB: Final = "sqlite:///fleet.sqlite3"


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
