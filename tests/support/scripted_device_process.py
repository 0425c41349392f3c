"""Scripted device: a gateway over the scripted language, as a process that a test can kill."""

import argparse
import logging
import sys
from pathlib import Path

from fleet_common.logs import Event, EventStream
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.gateway import Gateway
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings, OfflinePolicy
from tests.support.served_device import ReadingDrafter
from tests.support.whole import FLEET


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("broker", type=int, help="port of the broker")
    parser.add_argument("api", type=int, help="port of the API")
    parser.add_argument("state", type=Path, help="the folder `state_dir`")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    settings = DeviceSettings(
        fleet=FLEET,
        broker=BrokerSettings(port=arguments.broker),
        api_listen=f"127.0.0.1:{arguments.api}",
        state_dir=arguments.state,
        offline=OfflinePolicy.WAIT,
    )
    gateway = Gateway(DeviceService(settings, ReadingDrafter()))
    gateway.start()
    EventStream(sys.stdout, outlives_reader=True).write(Event.ONLINE)
    gateway.run()
    gateway.stop()


if __name__ == "__main__":
    main()
