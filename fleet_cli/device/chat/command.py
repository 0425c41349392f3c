"""`fleet device chat`: the command, and the terminal that it talks on."""

import contextlib
import logging
import os
import sys
from enum import StrEnum
from typing import Annotated, Final

import typer

from fleet_cli.device.chat.colours import Painter, wants_colours
from fleet_cli.device.chat.conversation import Conversation
from fleet_cli.errors import ExitCode
from fleet_cli.settings_flags import with_settings
from fleet_device.checks.doctor import refuse_beside_running
from fleet_device.device import Device
from fleet_device.requests.chat import ChatHistory
from fleet_device.settings import DeviceSettings
from schemas.printable import printable

_PROMPT: Final = "> "
_EDGE_S: Final = 1.0  # an edge's retained state comes with the connection
_TELLS_WAITS: Final = "fleet_device.client.retry.waits"


class _WhenFull(StrEnum):
    DROP = "drop"
    REFUSE = "refuse"


class StandardTerminal:
    """Standard input and output; a prompt and line editing where both are a terminal. Notes go to standard error."""

    def __init__(self) -> None:
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if self._interactive:
            with contextlib.suppress(ImportError):  # Python may have been built without it
                import readline  # noqa: F401 - `input` edits lines with it; it takes the terminal's settings
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")

    def read(self) -> str | None:
        """Return the next line; see `Terminal`."""
        if not self._interactive:
            return sys.stdin.readline() or None
        try:
            return input(_PROMPT)
        except EOFError:
            print()
            return None

    def write(self, text: str) -> None:
        print(text, end="", flush=True)

    def note(self, sentence: str) -> None:
        """Show a line that is no part of an answer."""
        print(sentence, file=sys.stderr, flush=True)


def talk(device: Device, *, system: str, drop: bool) -> None:
    """Talk on standard input and output.

    Args:
        device: Open.
        system: The system's message; empty for none.
        drop: Whether the oldest turns are dropped where the conversation becomes too long.
    """
    settings, terminal = device.settings, StandardTerminal()
    painter = Painter(colours=wants_colours(sys.stdout))
    logging.getLogger(_TELLS_WAITS).setLevel(logging.ERROR)  # the conversation says so itself
    terminal.note(
        f"Device {settings.device} of fleet {settings.fleet}, draft model {printable(device.drafter.name)}. "
        "/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends."
    )
    if legend := painter.legend():
        terminal.note(legend)
    if not device.wait_for_edge(_EDGE_S):
        terminal.note(f"[No edge of fleet {settings.fleet!r} is online; start one with `fleet edge run`.]")
    Conversation(
        device,
        terminal,
        painter,
        ChatHistory(system),
        answer_tokens=settings.max_new_tokens,
        drop=drop,
    ).run()


@with_settings(DeviceSettings)
def chat_command(
    settings: DeviceSettings,
    *,
    system: Annotated[str, typer.Option(help="The system's message: who the large model is to be.")] = "",
    when_full: Annotated[
        _WhenFull,
        typer.Option(
            help="Drop the oldest turns where the conversation is longer than the context, or refuse to go on."
        ),
    ] = _WhenFull.DROP,
) -> None:
    """Talk with the large model: streaming, with what was said before, tokens coloured by where they come from.

    Ctrl-C stops an answer, Ctrl-D ends. NO_COLOR turns colours off. Without a terminal each line of standard input is
    a message.
    """
    refuse_beside_running(settings.api_port, settings.device)
    # A conversation is one text at a time: its context gets all the memory.
    settings = settings.model_copy(update={"texts_at_once": 1})
    try:
        with Device(settings) as device:
            talk(device, system=system, drop=when_full is _WhenFull.DROP)
    except BrokenPipeError:
        # Whoever read the answers has had enough; Python must not try to write the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.READER_GONE) from None
