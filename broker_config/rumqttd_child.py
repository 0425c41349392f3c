"""The child process in which rumqttd runs: `python -m broker_config.rumqttd_child FILE`.

rumqttd cannot be shut down from within, so it has a process to itself, which also ends when the parent's end of
the pipe on standard input closes: a parent that was killed leaves no broker behind.
"""

import os
import sys
import threading

__all__ = ["main"]


def main() -> None:
    """Run the broker of the configuration file named by the first argument, until the parent is gone."""
    try:
        from iotcore.iotcore import IotCoreBroker  # noqa: PLC0415 - the message is for who lacks it
    except ImportError:
        sys.exit("The embedded broker is not installed: install the extra 'demo' of this package, or mosquitto.")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    IotCoreBroker(config_path=sys.argv[1]).run_forever()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
