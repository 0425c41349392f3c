"""Real devices over a toy draft in one process, which an administrator steers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.gateway import Gateway
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings
from fleet_device.steering.remote_settings import SteeredSettings
from tests.support.markov import MarkovScript

_SCRIPT: Final = MarkovScript(size=6, seed=7)
_WORDS: Final = ("</s>", *("abcde"))


@contextmanager
def steered_devices(
    names: Sequence[str], *, fleet: str, brokers: Mapping[str, BrokerSettings], folder: Path, **given: object
) -> Iterator[list[Gateway]]:
    with ExitStack() as stack:
        gateways = []
        for name in names:
            own = DeviceSettings.model_validate(
                {
                    "fleet": fleet,
                    "device": name,
                    "broker": brokers[name],
                    "api_listen": "",
                    "requests_at_once": 1,
                    "state_dir": folder / "state",
                    **given,
                }
            )
            remote = SteeredSettings.of(own)
            drafter = ScriptedDrafter(_SCRIPT, _WORDS, name="toy")
            gateway = Gateway(DeviceService(remote.settings, drafter), remote=remote)
            stack.callback(gateway.stop)
            gateway.start()
            gateways.append(gateway)
        yield gateways
