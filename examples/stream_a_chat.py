"""Chat with the fleet's large model.

    python examples/stream_a_chat.py [device.toml]

Every line of standard input is a message; Ctrl-D ends the chat. Needs a broker and an edge.
"""

import sys

from fleet_device import ChatMessage, Device, FleetError


def main(config: str | None = None) -> None:
    """Answer one message after the other, each answer as it is written."""
    messages: list[ChatMessage] = []
    with Device.from_config(config) as device:
        for line in sys.stdin:
            messages.append(ChatMessage("user", line.strip()))
            stream = device.stream(messages, max_new_tokens=60)
            for piece in stream:
                print(piece, end="", flush=True)
            print()
            messages.append(ChatMessage("assistant", stream.result().text))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except FleetError as error:
        sys.exit(str(error))
