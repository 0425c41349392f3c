"""What every test may ask for."""

from tests.support.brokers import mosquitto, own_mosquitto, start_mosquitto

__all__ = ["mosquitto", "own_mosquitto", "start_mosquitto"]
