"""A device that serves its API through a real broker, with an edge over a language of known distribution."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.gateway import Gateway
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings
from tests.support.edge_thread import NO_QUOTAS
from tests.support.memory_device import TalkingCodec
from tests.support.scripted_language import CONTEXT, LANGUAGE, draft_language
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.waiting import PATIENCE_S
from tests.support.whole import FLEET, Whole


class ReadingDrafter(ScriptedDrafter):
    def __init__(self) -> None:
        draft = draft_language()
        super().__init__(draft, LANGUAGE.words, context=CONTEXT, name="scripted")
        self.codec = TalkingCodec(LANGUAGE.words)

    def another(self) -> "ReadingDrafter":
        return ReadingDrafter()


@dataclass(frozen=True, slots=True)
class Served:
    url: str
    gateway: Gateway
    whole: Whole


@contextmanager
def served_device(folder: Path, **given: Any) -> Iterator[Served]:
    with MosquittoProcess(Broker(fleet=FLEET)) as broker:
        whole = scripted_whole(broker.port, folder)
        with whole.edge(), device_at(whole, **given) as served:
            yield served


def scripted_whole(port: int, folder: Path) -> Whole:
    verifier = ScriptedVerifier(LANGUAGE, LANGUAGE.words, context=CONTEXT, name="scripted-target")
    return Whole(port, folder, verifier, {"quotas": NO_QUOTAS})


@contextmanager
def device_at(whole: Whole, drafter: Drafter | None = None, **given: Any) -> Iterator[Served]:
    fixed: dict[str, Any] = {"fleet": FLEET, "broker": BrokerSettings(port=whole.port), "api_listen": "127.0.0.1:0"}
    gateway = Gateway(DeviceService(DeviceSettings.model_validate(fixed | given), drafter or ReadingDrafter()))
    gateway.start()
    try:
        assert gateway.service.edges.wait_online(PATIENCE_S)
        yield Served(f"{gateway.address}/v1", gateway, whole)
    finally:
        gateway.stop()
