"""Generate one output.

    python examples/write_a_text.py "Why is the sky blue?" [device.toml]

Needs a broker and an edge, such as examples/run_an_edge.py.
"""

import sys

from fleet_device import Device, FleetError


def main(prompt: str, config: str | None = None) -> None:
    """Print the output, and how it went."""
    with Device.from_config(config) as device:
        text = device.generate(prompt, max_new_tokens=60)
    print(text.text)
    print(f"[{len(text.tokens)} tokens, acceptance {text.acceptance}, session {text.session}]", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except FleetError as error:
        sys.exit(str(error))
