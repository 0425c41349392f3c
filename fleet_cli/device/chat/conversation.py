"""Conversation on a terminal: reads a line, obeys it or has it answered, until there are no more."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

from fleet_cli.device.chat.colours import Painter
from fleet_cli.device.chat.figures import ChatFigures
from fleet_device.drafters.contract import Drafter
from fleet_device.errors import PromptTooLong, SessionRefused
from fleet_device.requests.chat import ChatHistory, ChatMessage
from fleet_device.requests.generate import GeneratedText
from fleet_device.requests.queue import TextStream
from schemas.errors import FleetError
from schemas.printable import printable
from schemas.reasons import EndReason, RefusalCode

HELP: Final = (
    "/stats         how the answers were written",
    "/reset         forget the conversation; the system's message stays",
    "/system TEXT   set the system's message; without TEXT show it, with - remove it",
    "/help          this list",
    "/quit          end; so does Ctrl-D",
    "//…            a message that begins with /…",
    "Ctrl-C         stop the answer that is being written; what there is of it stays in the conversation",
)

_REMOVE: Final = "-"


class Talker(Protocol):
    """What is needed of the device."""

    @property
    def drafter(self) -> Drafter: ...

    def count_tokens(self, prompt: Sequence[ChatMessage]) -> int: ...

    def stream(self, prompt: Sequence[ChatMessage]) -> TextStream: ...


class Terminal(Protocol):
    """Where the conversation takes place."""

    def read(self) -> str | None:
        """Return the next line without its end; None if there are no more.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed meanwhile.
        """

    def write(self, text: str) -> None:
        """Show more of an answer; it is fit for a terminal."""

    def note(self, sentence: str) -> None:
        """Show a line that is no part of an answer."""


class Conversation:
    """A chat.

    Args:
        talker: Writes the answers.
        terminal: Where it takes place.
        painter: Makes the answers fit for it.
        history: What was said.
        answer_tokens: Most tokens of an answer; of the context, at least as many are left for it, or half of it.
        drop: Whether the oldest turns are dropped where the conversation becomes too long; otherwise it is refused.
    """

    def __init__(
        self,
        talker: Talker,
        terminal: Terminal,
        painter: Painter,
        history: ChatHistory,
        *,
        answer_tokens: int,
        drop: bool,
    ) -> None:
        self._talker = talker
        self._terminal = terminal
        self._painter = painter
        self._history = history
        self._answer_tokens = answer_tokens
        self._drop = drop
        self._figures = ChatFigures()
        self._ended = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/stats": self._stats,
            "/reset": self._reset,
            "/system": self._system,
            "/help": self._help,
            "/quit": self._quit,
        }

    def run(self) -> None:
        """Go on until the end. What fails is told, and the conversation goes on."""
        while not self._ended:
            try:
                line = self._terminal.read()
                if line is None:
                    return
                self._take(line.strip())
            except KeyboardInterrupt:
                self._terminal.note("\n[Ctrl-D or /quit ends the chat.]")
            except FleetError as error:
                self._terminal.note(f"[{printable(str(error))}]")

    def _take(self, line: str) -> None:
        if not line:
            return
        if line.startswith("/") and not line.startswith("//"):
            word, _, rest = line.partition(" ")
            command = self._commands.get(word)
            if command is None:
                self._terminal.note(f"[There is no command {printable(word)}; /help lists them.]")
            else:
                command(rest.strip())
            return
        self._answer(line.removeprefix("/") if line.startswith("//") else line)

    # Answers

    def _answer(self, question: str) -> None:
        context = self._talker.drafter.context
        room = context - max(1, min(self._answer_tokens, context // 2))
        while True:
            messages, dropped = self._history.ask(question, count=self._talker.count_tokens, room=room, drop=self._drop)
            self._tell_dropped(dropped)
            try:
                text = self._write(messages)
            except (PromptTooLong, SessionRefused) as error:
                # The large model may hold less than the draft model.
                too_long = isinstance(error, PromptTooLong) or error.code is RefusalCode.PROMPT_TOO_LONG
                if not (too_long and self._drop and self._history.drop_oldest()):
                    raise
                self._tell_dropped(1)
            else:
                break
        self._figures.add(text)
        if text.text.strip():
            self._history.answered(question, text.text)
        if text.reason is EndReason.LENGTH:
            self._terminal.note(f"[The answer was cut after {len(text.tokens)} tokens: see 'max_new_tokens'.]")
        elif text.reason is EndReason.CANCELLED:
            self._terminal.note("[Stopped.]")

    def _write(self, messages: Sequence[ChatMessage]) -> GeneratedText:
        shown = ""
        with self._talker.stream(messages) as stream, _stopping(stream):
            stream.on_wait = lambda reason: self._terminal.note(f"[Waiting: {printable(reason)}]")
            try:
                for piece in stream.pieces():
                    shown += piece.text
                    self._terminal.write(self._painter.paint(piece))
                text = stream.result()
            finally:
                if shown:
                    self._terminal.write("\n")
        if text.text != shown:
            # What was written without an edge may be taken back when one is there again.
            self._terminal.note("[Unverified tokens were taken back; the whole answer is now:]")
            self._terminal.write(f"{printable(text.text)}\n")
        return text

    def _tell_dropped(self, dropped: int) -> None:
        if dropped:
            what = "The oldest turn is" if dropped == 1 else f"The {dropped} oldest turns are"
            self._terminal.note(f"[{what} no longer part of the conversation, which is longer than the context.]")

    # Commands

    def _stats(self, _rest: str) -> None:
        for line in self._figures.lines(
            turns=self._history.turns,
            prompt_tokens=self._history.prompt_tokens,
            context=self._talker.drafter.context,
        ):
            self._terminal.note(line)

    def _reset(self, _rest: str) -> None:
        self._history.reset()
        self._terminal.note("[The conversation begins anew.]")

    def _system(self, rest: str) -> None:
        if rest:
            self._history.system = "" if rest == _REMOVE else rest
        now = self._history.system
        self._terminal.note(
            f"[The system's message is: {printable(now)}]" if now else "[There is no system's message.]"
        )

    def _help(self, _rest: str) -> None:
        for line in (*HELP, self._painter.legend()):
            if line:
                self._terminal.note(line)

    def _quit(self, _rest: str) -> None:
        self._ended = True


@contextmanager
def _stopping(stream: TextStream) -> Iterator[None]:
    """Let Ctrl-C stop the text, however often it is pressed, and nothing else."""

    def handle(*_: Any) -> None:  # noqa: ANN401 - a signal handler's
        stream.cancel()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
