import json
import os
import threading
from pathlib import Path

import pytest

from benchmarks.fenced import main
from benchmarks.fenced.thread_meter import thread_times_s


def test_the_time_of_a_thread_that_works_grows() -> None:
    before = thread_times_s(os.getpid())
    seen = threading.Event()

    def work() -> None:
        while not seen.is_set():
            sum(range(1000))

    worker = threading.Thread(target=work)
    worker.start()
    number = worker.native_id
    while number not in (during := thread_times_s(os.getpid())) or during[number] == 0.0:
        pass  # it works on until it has been seen to
    seen.set()
    worker.join()
    assert number not in before
    assert during[number] > 0.0


@pytest.mark.broker
@pytest.mark.slow
def test_the_costs_are_written(mosquitto: object, tmp_path: Path) -> None:
    del mosquitto  # it is asked for only to skip where there is none
    file = tmp_path / "costs.json"
    assert main(["--seconds", "0.5", "--rate", "500", "--json", str(file)]) in {0, 1}
    costs = json.loads(file.read_text())["costs"]
    assert [(cost["tls"], cost["qos"]) for cost in costs] == [(False, 0), (False, 1), (True, 0), (True, 1)]
    assert all(cost["sent_per_s"] > 0 and cost["flooded"] > 0 and cost["bare_reader"] > 0 for cost in costs)
