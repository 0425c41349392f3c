import os
import subprocess
import sys

from benchmarks.faults.soak import Memory


def test_memory_is_looked_at_over_the_longest_life_of_a_process_after_the_warm_up() -> None:
    memory = Memory(
        {
            "edge-1": [
                *((1, float(second), 500.0) for second in range(50)),  # the warm-up
                *((1, float(second), 100.0) for second in range(50, 60)),
                *((2, float(second), 200.0 + second / 3600) for second in range(60, 100)),
            ]
        }
    )
    points = memory.points("edge-1", since=50.0)
    assert len(points) == 40
    assert points[0] == (60.0 / 3600, 200.0 + 60.0 / 3600)
    assert memory.points("nobody", since=0.0) == []


def test_many_samples_are_thinned_to_medians() -> None:
    memory = Memory({"edge-1": [(1, float(second), 100.0 + (second % 3 == 0) * 50.0) for second in range(3000)]})
    points = memory.points("edge-1", since=0.0)
    assert 300 <= len(points) <= 400
    assert {megabytes for _, megabytes in points} == {100.0}


def test_a_process_that_has_ended_is_left_out() -> None:
    memory = Memory()
    memory.take("self", os.getpid(), 1.0)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    memory.take("gone", process.pid, 1.0)
    assert list(memory.samples) == ["self"]
    ((_, _, megabytes),) = memory.samples["self"]
    assert 1.0 < megabytes < 10_000.0
