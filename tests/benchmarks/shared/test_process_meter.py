import os
import time

from benchmarks.shared.process_meter import ProcessMeter


def test_memory_and_processor_time_of_a_process_are_sampled() -> None:
    began = time.monotonic()
    with ProcessMeter(os.getpid()) as meter:
        pass
    assert meter.memory_mb(began, time.monotonic()) > 1
    assert meter.memory_mb(began - 2, began - 1) == 0
    assert meter.cpu(began, time.monotonic()) == 0  # one sample is no span
