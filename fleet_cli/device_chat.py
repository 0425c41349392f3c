"""Command `fleet device chat`: talk with the large model on a terminal."""

import contextlib
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, Protocol, TextIO, Unpack

import typer

from fleet_cli.commands import CommandError
from fleet_cli.options import ends_with_reader, on_interrupt, with_options, with_settings
from fleet_device.checks.doctor import refuse_beside_running
from fleet_device.device import Device
from fleet_device.drafters.contract import Drafter
from fleet_device.errors import PromptTooLong, SessionRefused
from fleet_device.requests.chat import ChatHistory
from fleet_device.requests.generate import GeneratedText, Piece
from fleet_device.requests.prompt import TextOptions, prepare_request
from fleet_device.requests.queue import TextStream
from fleet_device.requests.structured import ChatMessage
from fleet_device.session.sequence import TokenOrigin
from fleet_device.settings import DeviceSettings
from schemas.errors import FleetError
from schemas.fields import MAX_TOKENS
from schemas.printable import printable, printable_line
from schemas.reasons import EndReason, RefusalCode

if TYPE_CHECKING:
    from rich.color import ColorSystem


_PANEL: Final = "Sampling"
_BIAS: Final = re.compile(r"(\d{1,10})([+-]\d+(?:\.\d*)?)")


def _option(kind: type, flag: str, meaning: str) -> tuple[object, object]:
    return Annotated[kind | None, typer.Option(flag, help=meaning, rich_help_panel=_PANEL)], None


_SAMPLING: Final = {
    "min_p": _option(float, "--min-p", "Keep tokens of at least this share of the largest probability; 0 keeps all."),
    "presence_penalty": _option(float, "--presence-penalty", "-2 to 2: against tokens that the output has."),
    "frequency_penalty": _option(float, "--frequency-penalty", "-2 to 2: the same, for each time that it has them."),
    "repetition_penalty": _option(
        float, "--repetition-penalty", "Above 1: against tokens that the prompt or the output has."
    ),
    "logit_bias": _option(list[str], "--logit-bias", "TOKEN_ID+BIAS or TOKEN_ID-BIAS, such as 15043-100; repeatable."),
    "min_tokens": _option(int, "--min-tokens", "The output does not end before it has this number of tokens."),
    "ignore_eos": (
        Annotated[
            bool, typer.Option("--ignore-eos", help="The output does not end by itself.", rich_help_panel=_PANEL)
        ],
        False,
    ),
}


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a request's sampling, as `sampling`."""

    def read(given: dict[str, Any]) -> nullcontext[object]:
        given["logit_bias"] = dict(map(_read_bias, given["logit_bias"] or ()))
        if given.pop("ignore_eos"):
            given["min_tokens"] = MAX_TOKENS
        options: TextOptions = {name: value for name, value in given.items() if value is not None}  # type: ignore[assignment]
        return nullcontext(options)

    return with_options("sampling", _SAMPLING, read)(command)


def _read_bias(text: str) -> tuple[int, float]:
    found = _BIAS.fullmatch(text)
    if found is None:
        raise CommandError(
            f"--logit-bias {text[:100]} cannot be read; give the id of a token, + or -, and a number, such as "
            "15043-100."
        )
    return int(found[1]), float(found[2])


_ORIGINS: Final[Mapping[TokenOrigin, tuple[str, str]]] = {
    TokenOrigin.DRAFTED: ("green", "drafted and accepted"),
    TokenOrigin.CORRECTED: ("yellow", "corrected"),
    TokenOrigin.BONUS: ("cyan", "drawn by the edge behind a draft"),
    TokenOrigin.EDGE_ONLY: ("cyan", "edge-only"),
    TokenOrigin.FORCED: ("magenta", "forced by a grammar"),
    TokenOrigin.OTHER_TARGET: ("underline yellow", "of another target model"),
    TokenOrigin.UNVERIFIED: ("underline red", "unverified"),
}
_THINKING: Final = "dim"


def colours_of(stream: TextIO) -> "ColorSystem | None":
    """Return the colours to write with: those of a terminal that has them, unless NO_COLOR is set."""
    from rich.color import ColorSystem
    from rich.console import Console

    console = Console(file=stream)
    return ColorSystem.STANDARD if console.color_system and not console.no_color else None


def paint(piece: Piece, colours: "ColorSystem | None") -> str:
    """Return a piece without control characters, coloured by the origin of its tokens."""
    parts = [(_ORIGINS[each.origin][0], each.text) for each in piece.parts] or [("none", piece.text)]
    return "".join(_styled(text, style, colours) for style, text in [(_THINKING, piece.reasoning), *parts])


def _styled(text: str, style: str, colours: "ColorSystem | None") -> str:
    from rich.style import Style

    return Style.parse(style).render(printable(text), color_system=colours)


def legend(colours: "ColorSystem") -> str:
    """Return the meaning of each colour."""
    return " · ".join(_styled(words, style, colours) for style, words in _ORIGINS.values())


def answer_lines(text: GeneratedText) -> list[str]:
    """Return how an answer was generated."""
    generation, origins = text.generation, Counter(text.origins)
    first = "" if generation.first_ms is None else f", the first after {generation.first_ms / 1e3:.2f} s"
    rate = f"{text.tokens_per_s:.1f} tokens/s{first}; {text.reason.value}"
    counted = ", ".join(f"{origins[each]} {words}" for each, (_, words) in _ORIGINS.items() if origins[each])
    accepted = "no draft was tested"
    if text.acceptance is not None:
        accepted = f"{text.acceptance:.2f} of {generation.counters.tested} draft tokens"
    lines = [
        f"{len(text.tokens)} tokens in {generation.wall_ms / 1e3:.1f} s, {rate}",
        f"tokens      {counted or 'none'}",
        f"acceptance  {accepted}",
    ]
    if generation.choice is not None:
        lines.append(f"plan        {generation.choice.plan}: {printable_line(generation.choice.reason)}")
    return lines


HELP: Final = (
    "/stats         how the last answer was written",
    "/reset         forget the conversation; the system's message stays",
    "/system TEXT   set the system's message; without TEXT show it, with - remove it",
    "/help          this list",
    "/quit          end; so does Ctrl-D",
    "//…            a message that begins with /…",
    "Ctrl-C         stop the answer that is being written; what there is of it stays in the conversation",
)


class Talker(Protocol):
    @property
    def drafter(self) -> Drafter: ...

    def count_tokens(self, prompt: Sequence[ChatMessage]) -> int: ...

    def stream(self, prompt: Sequence[ChatMessage], **options: Unpack[TextOptions]) -> TextStream: ...


@dataclass(slots=True)
class Conversation:
    """A chat. `answer_tokens` is the maximum of an answer; at least as many, or half of the context, are left for it.

    When the conversation becomes too long, the oldest turns are dropped.
    """

    _talker: Talker
    _terminal: "StandardTerminal"
    _colours: "ColorSystem | None"
    _history: ChatHistory
    _: KW_ONLY
    answer_tokens: int
    options: TextOptions = field(default_factory=TextOptions)
    _last: GeneratedText | None = None
    _ended: bool = False

    def run(self) -> None:
        """Run until the end. An error is shown and does not end the conversation."""
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
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line.removeprefix("/"))
            return
        word, _, rest = line.partition(" ")
        match word:
            case "/stats":
                self._stats()
            case "/reset":
                self._history.reset()
                self._terminal.note("[The conversation is empty.]")
            case "/system":
                self._system(rest.strip())
            case "/help":
                for help_line in (*HELP, *([legend(self._colours)] if self._colours else [])):
                    self._terminal.note(help_line)
            case "/quit":
                self._ended = True
            case _:
                self._terminal.note(f"[There is no command {printable(word)}; /help lists them.]")

    def _answer(self, question: str) -> None:
        context = self._talker.drafter.context
        room = context - max(1, min(self.answer_tokens, context // 2))
        while True:
            messages, dropped = self._history.begin_turn(question, count=self._talker.count_tokens, room=room)
            self._tell_dropped(dropped)
            try:
                text = self._write(messages)
            except (PromptTooLong, SessionRefused) as error:
                # The large model's context may be shorter than the draft model's.
                too_long = isinstance(error, PromptTooLong) or error.code is RefusalCode.PROMPT_TOO_LONG
                if not (too_long and self._history.drop_oldest()):
                    raise
                self._tell_dropped(1)
            else:
                break
        self._last = text
        if text.text.strip():
            self._history.answered(question, text.text)
        if text.reason is EndReason.LENGTH:
            self._terminal.note(f"[The answer was cut after {len(text.tokens)} tokens: see 'max_new_tokens'.]")
        elif text.reason is EndReason.CANCELLED:
            self._terminal.note("[Stopped.]")

    def _write(self, messages: Sequence[ChatMessage]) -> GeneratedText:
        shown = ""
        # Ctrl-C stops only the answer, however often it is pressed.
        with self._talker.stream(messages, **self.options) as stream, on_interrupt(lambda *_: stream.cancel()):
            stream.on_wait = lambda reason: self._terminal.note(f"[Waiting: {printable(reason)}]")
            try:
                for piece in stream.pieces():
                    shown += piece.text
                    self._terminal.write(paint(piece, self._colours))
                text = stream.result()
            finally:
                if shown:
                    self._terminal.write("\n")
        if text.text != shown:
            # Tokens generated without an edge may be withdrawn when one is back.
            self._terminal.note("[Unverified tokens were taken back; the whole answer is now:]")
            self._terminal.write(f"{printable(text.text)}\n")
        return text

    def _tell_dropped(self, dropped: int) -> None:
        if dropped:
            what = "The oldest turn is" if dropped == 1 else f"The {dropped} oldest turns are"
            self._terminal.note(f"[{what} no longer part of the conversation, which is longer than the context.]")

    def _stats(self) -> None:
        for line in ["Nothing has been written yet."] if self._last is None else answer_lines(self._last):
            self._terminal.note(line)

    def _system(self, text: str) -> None:
        if text:
            self._history.system = "" if text == "-" else text
        now = self._history.system
        self._terminal.note(
            f"[The system's message is: {printable(now)}]" if now else "[There is no system's message.]"
        )


_PROMPT: Final = "> "
EDGE_S: Final = 1.0  # an edge's retained state comes with the connection
TELLS_WAITS: Final = "fleet_device.client.driver.waits"


class StandardTerminal:
    """Standard input and output, with line editing on a terminal. Notes go to standard error."""

    def __init__(self) -> None:
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if self._interactive:
            with contextlib.suppress(ImportError):  # Python may have been built without it
                import readline  # noqa: F401 - `input` edits lines with it; it takes the terminal's settings
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")

    def read(self) -> str | None:
        """Return the next line; None at the end of input."""
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
        print(sentence, file=sys.stderr, flush=True)


def talk(device: Device, *, system: str, options: TextOptions) -> None:
    settings, terminal = device.settings, StandardTerminal()
    colours = colours_of(sys.stdout)
    logging.getLogger(TELLS_WAITS).setLevel(logging.ERROR)  # the conversation says so itself
    terminal.note(
        f"Device {settings.device} of fleet {settings.fleet}, draft model {printable(device.drafter.name)}. "
        "/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends."
    )
    if colours:
        terminal.note(legend(colours))
    if not device.wait_for_edge(EDGE_S):
        terminal.note(f"[No edge of fleet {settings.fleet!r} is online; start one with `fleet edge run`.]")
    answer_tokens = settings.max_new_tokens
    Conversation(device, terminal, colours, ChatHistory(system), answer_tokens=answer_tokens, options=options).run()


@with_settings(DeviceSettings)
@with_sampling
def chat_command(
    settings: DeviceSettings,
    sampling: TextOptions,
    *,
    system: Annotated[str, typer.Option(help="System message for the large model.")] = "",
) -> None:
    """Chat with the large model: streamed, with history, tokens coloured by their origin.

    Ctrl-C stops an answer, Ctrl-D ends. NO_COLOR turns colours off. Without a terminal, each line of standard input is
    a message.
    """
    prepare_request("checked", settings, **sampling)  # before the model is loaded
    refuse_beside_running(settings)
    # A conversation runs one request at a time, whose context gets all the memory.
    settings = settings.model_copy(update={"requests_at_once": 1})
    with ends_with_reader(), Device(settings) as device:
        talk(device, system=system, options=sampling)
