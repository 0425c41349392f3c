"""Lifeline: a converter ends with the command that started it, however that one ends.

The command holds the other end of the converter's standard input and never writes; the kernel closes it even
when the command is killed.
"""

import os
import sys
import threading


def exit_with_parent() -> None:
    """End this process as soon as its standard input ends."""
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
