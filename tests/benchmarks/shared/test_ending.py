import os
import signal

import pytest

from benchmarks.shared.ending import ending_cleanly


def test_sigterm_ends_what_runs_with_its_clean_up() -> None:
    cleaned = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with ending_cleanly(), pytest.raises(SystemExit) as caught:
        work()
    assert cleaned
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
