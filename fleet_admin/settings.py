"""Settings of an administrator's programs, from flags, the environment (`FLEET_ADMIN_…`, nested with `__`) and TOML."""

from typing import ClassVar

from pydantic import Field

from fleet_common.mqtt.settings import BrokerSettings
from fleet_common.settings import Settings, setting
from schemas.names import Name


class AdminSettings(Settings):
    """Where an administrator's programs find the fleet, and who they are there."""

    variable_prefix: ClassVar[str] = "FLEET_ADMIN_"

    fleet: Name = setting("fleet", "Name of the fleet.")
    name: Name = setting("monitor", "Name of this monitor; its identity at the broker, used by no other program.")
    broker: BrokerSettings = Field(default_factory=BrokerSettings)
