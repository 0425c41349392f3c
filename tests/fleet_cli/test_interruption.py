import subprocess
import sys

WORDS = """
import signal, time
from fleet_cli.options import Interruption

interruption = Interruption()
signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGINT))
signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
end = time.monotonic() + 2.0
came = sum(interruption.wait(0.0004) for _ in iter(lambda: time.monotonic() < end, False))
signal.setitimer(signal.ITIMER_REAL, 0.0)
print(came)
"""


def test_a_signal_at_any_moment_of_the_wait_ends_it() -> None:
    """With `threading.Event` one of these thousands of signals waits for the lock that it has interrupted."""
    done = subprocess.run([sys.executable, "-c", WORDS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > 0
