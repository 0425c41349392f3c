"""Chat of the demo: one of its devices, on this terminal, while broker and edge go on."""

import signal
import subprocess
import sys
from collections.abc import Sequence


def run_chat(device: str, arguments: Sequence[str]) -> int:
    """Run `fleet device chat` until its end, and return its exit code. Ctrl-C is its own: there it stops an answer.

    Args:
        device: The device's name.
        arguments: Its settings, as flags.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        # The demo's device serves no applications; a port that is in use does not concern it.
        command = ["device", "chat", "--device", device, "--api-port", "0", *arguments]
        return subprocess.run([sys.executable, "-m", "fleet_cli.main", *command], check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)
