"""What every test may ask for."""

import fleet_edge.openmp  # first: it sets how torch's threads wait, before any test imports torch
from tests.support.brokers import mosquitto, own_mosquitto, start_mosquitto

__all__ = ["fleet_edge", "mosquitto", "own_mosquitto", "start_mosquitto"]
