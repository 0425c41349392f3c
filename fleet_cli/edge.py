"""Command group `fleet edge`."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from gguf import TokenType

from fleet_cli.commands import CommandError
from fleet_cli.edge_advise import advise_command
from fleet_cli.identities import enroll_command
from fleet_cli.options import run_checks, with_events, with_settings
from fleet_common.gguf_files import read_header
from fleet_common.grammar.compiler import BANNED_FILE, BannedGrammars
from fleet_common.grammar.errors import GrammarUnavailable
from fleet_common.host import Systemd, use_one_heap
from fleet_common.logs import Event, EventStream, hold_back_repetition, write_log_as
from fleet_common.mqtt.tls import certificate_name
from fleet_common.settings import load_settings
from fleet_device.drafters.contract import DrafterError
from fleet_device.requests.chat import chat_prompt
from fleet_device.requests.structured import ChatMessage
from fleet_edge.edge import Edge
from fleet_edge.session_log import parse_url, shown
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.blocks_engine import kept_pages_path
from fleet_edge.verifiers.registry import check_target_files, read_target_tokens
from fleet_edge.verifiers.source import fetch_files, is_gguf
from fleet_edge.verifiers.tokens import GgufTokenizer, chat_format
from schemas.control import ChatFormat
from schemas.errors import FleetError
from schemas.names import probe_name

_log = logging.getLogger(__name__)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@contextmanager
def edge_dashboard(settings: EdgeSettings) -> Iterator[Callable[[], str]]:
    """Yield a function that starts the dashboard, and stop it at the end.

    Call the function once the edge has made its database; it returns the address, empty without a dashboard. If the
    dashboard cannot start, the edge runs without it.
    """
    if not settings.dashboard:
        yield lambda: ""
        return
    try:
        from fleet_admin.dashboard.app import DashboardServer
        from fleet_admin.dashboard.settings import DashboardSettings
    except ModuleNotFoundError as error:
        raise CommandError(
            f"The setting dashboard needs the package {error.name!r}; install this one with the extra 'dashboard'."
        ) from error
    # Everything but its address comes from its own settings: an edge's identity is not an administrator's.
    flags = {"listen": settings.dashboard, "db": settings.db}
    named = os.environ.get(DashboardSettings.variable_prefix + "CONFIG")
    served = load_settings(DashboardSettings, config=Path(named) if named else None, flags=flags)
    running: list[DashboardServer] = []

    def start() -> str:
        try:
            running.append(DashboardServer(served))
        except FleetError as error:
            _log.error("The edge has no dashboard: %s", error)
            return ""
        return running[0].address

    try:
        yield start
    finally:
        for each in running:
            each.stop()


@app.command("run")
@with_events(outlives_reader=True)
@with_settings(EdgeSettings)
def run_command(settings: EdgeSettings, *, events: EventStream) -> None:
    """Verify the drafts of a fleet until stopped. SIGTERM lets open sessions end first; SIGINT does not.

    A second SIGTERM ends it at once. Open sessions then resume at another edge with the same target model, or here when
    this one is back. SIGUSR1, before another target model is served, waits until all open sessions have ended.
    """
    write_log_as(settings.log_format, fleet=settings.fleet, edge=settings.edge)
    hold_back_repetition()
    use_one_heap()  # before there are threads
    running = Edge(settings, warm_prompts=read_warm_prompts(settings))
    unit = Systemd.from_environment()

    def say(sentence: str) -> None:
        if settings.log_format == "json":
            _log.info(sentence)
        elif not events:
            print(sentence, file=sys.stderr, flush=True)

    def tell() -> None:
        online = (
            f"Edge {settings.edge} of fleet {settings.fleet} is online at {settings.broker.host}:{settings.broker.port}"
        )
        info, database = running.target, shown(parse_url(settings.db))
        events.write(
            Event.ONLINE,
            fleet=settings.fleet,
            edge=settings.edge,
            host=settings.broker.host,
            port=settings.broker.port,
            target=info.name,
            vocabulary=str(info.vocabulary),
            context=info.context,
            runs_on=info.runs_on,
            database=database,
        )
        target = f"target {info.name}, {info.vocabulary}, context {info.context}, on {info.runs_on}"
        say(f"{online}: {target}, sessions in {database}.")
        if address := start_dashboard():
            say(f"Its dashboard is at {address}.")
        unit.ready(f"{online}.")

    with edge_dashboard(settings) as start_dashboard:
        running.check()
        events.write(Event.LOADING, target=settings.target)
        say(f"Loading the target model {settings.target} …")
        handed_over = running.run(
            on_online=tell,
            on_step=unit.alive,
            on_end=unit.stopping,
            on_drain=lambda sessions: events.write(Event.DRAINING, sessions=sessions),
        )
        events.write(Event.STOPPED, handed_over=handed_over)


# The identity among them is the probe's.
_FLAGS: Final = (
    "fleet", "edge", "target", "broker.host", "broker.port", "broker.ca", "broker.certificate", "broker.key",
)  # fmt: skip


@app.command("selftest")
@with_settings(EdgeSettings, only=_FLAGS)
def selftest_command(
    settings: EdgeSettings,
    *,
    probe: Annotated[str | None, typer.Option(help="Device name to use; by default probe-<edge>.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Have the running edge verify drafts with a known verdict, through the broker as a device would.

    The edge continues its work. Exit code 0 if all is well, 1 if a check failed, 2 if the configuration is invalid.
    Over TLS it needs its own identity with the role device, given as --certificate and --key, and says how to make one.
    """
    from fleet_device.checks.edge_check import EdgeCheck  # a device, which a start of an edge need not wait for

    name = probe or probe_name(settings.edge)
    _check_identity(name, settings)
    check_target_files(settings)  # before transformers is imported, which takes seconds
    tokens = read_target_tokens(settings)
    run_checks(
        lambda on_check: EdgeCheck(settings.fleet, settings.edge, name, settings.broker, tokens, on_check).run(),
        as_json=as_json,
        edge=settings.edge,
    )


def _check_identity(name: str, settings: EdgeSettings) -> None:
    """Refuse a name that is in use, because a broker closes the older of two connections with one name."""
    certificate = settings.broker.certificate
    found = certificate_name(certificate)
    if found == settings.edge:
        ours = probe_name(settings.edge) if name == settings.edge else name
        raise CommandError(
            f"The certificate {certificate} is the edge's own, which would throw the running edge off the broker: "
            f"make one for the self-test with `fleet edge enroll {ours}`, and give it with --certificate and --key."
        )
    if found is not None and found != name:
        raise CommandError(
            f"The certificate {certificate} is that of {found!r}, and the self-test asks as {name!r}: "
            f"give the certificate of {name!r}, or --probe {found}."
        )
    if name == settings.edge:
        raise CommandError(
            f"Asking as {name!r} would throw the running edge of that name off the broker: leave --probe out, or "
            "give another name."
        )


@app.command("grammars")
@with_settings(EdgeSettings, only=("spool",))
def grammars_command(
    settings: EdgeSettings,
    *,
    lift: Annotated[str | None, typer.Option(help="SHA-256, or its beginning, of a grammar to allow again.")] = None,
) -> None:
    """List the grammars that this edge refuses for a day, because they ended the process that compiled them."""
    banned = BannedGrammars(settings.spool / BANNED_FILE)
    found = banned.until()
    if lift is not None:
        chosen = [digest for digest in found if digest.startswith(lift)]
        if len(chosen) != 1:
            raise CommandError(f"{len(chosen)} banned grammars begin with {lift!r}; the list is `fleet edge grammars`.")
        banned.lift(chosen[0])
        print(f"The grammar {chosen[0]} is allowed again.")
        return
    for digest, until in found.items():
        print(digest, "until", datetime.fromtimestamp(until, UTC).isoformat(timespec="seconds"))
    if not found:
        print("No grammar is banned.")


@app.command("forget-prompts")
@with_settings(EdgeSettings, only=("fleet", "edge", "kv_kept"))
def forget_prompts_command(settings: EdgeSettings) -> None:
    """Delete the prompts and outputs that this edge keeps, in computed form, for its next start.

    A running edge drops those of ended requests when the next request begins, and keeps nothing until it is restarted.
    It computes its warm prompts again.
    """
    path = kept_pages_path(settings)
    if path is None or not path.exists():
        print(f"Edge {settings.edge} of fleet {settings.fleet} keeps no prompts here.")
        return
    path.unlink()
    print(f"{path} is deleted.")


app.command("advise")(advise_command)
app.command("enroll")(enroll_command)


_QUESTIONS: Final = ("A", "7")
"""Two messages of a user: what both prompts begin with belongs to the system prompt."""


def read_warm_prompts(settings: EdgeSettings) -> list[list[int]]:
    """Return the tokens with which the prompts of `warm_prompts` begin, whatever a user asks.

    Raises `CommandError` if the file cannot be read, or the target's chat template does not take its messages.
    """
    if settings.warm_prompts is None:
        return []
    path = settings.warm_prompts.expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        codec = _codec(settings.target)
    except (OSError, ValueError, GrammarUnavailable) as error:
        raise CommandError(f"warm_prompts cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(_common(codec, _messages(json.loads(line))))
        except (ValueError, DrafterError) as error:
            raise CommandError(f"Line {number} of {path} is no warm prompt: {error}") from error
    return found


def _messages(line: object) -> list[ChatMessage]:
    if isinstance(line, str):
        return [ChatMessage("system", line)]
    if isinstance(line, list) and line and all(_is_message(each) for each in line):
        return [ChatMessage(each["role"], each["content"]) for each in line]
    raise ValueError('write a JSON string, or a list such as [{"role": "system", "content": "…"}]')


def _is_message(value: Any) -> bool:  # noqa: ANN401 - JSON
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def _common(codec: "_Codec", messages: Sequence[ChatMessage]) -> list[int]:
    one, two = (chat_prompt(codec, [*messages, ChatMessage("user", each)]).tokens for each in _QUESTIONS)
    length = next((at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    return one[:length]


class _Codec:
    """The text side of a target's files, as chat prompts need it."""

    end_tokens = ()

    def __init__(self, chat: ChatFormat, control: Iterable[str], encode: Callable[[str], list[int]]) -> None:
        self.chat_template = chat.template
        self.control_texts = tuple(sorted(control))
        self._special = {"bos": chat.bos, "eos": chat.eos}
        self._encode = encode

    def special_text(self, name: str) -> str:
        return self._special[name]

    def encode(self, text: str, *, special: bool = False) -> list[int]:  # noqa: ARG002 - templates are rendered
        return self._encode(text) if text else []

    def piece(self, token: int) -> bytes:  # noqa: ARG002 - of thinking, which does not matter here
        return b""


def _codec(target: str) -> _Codec:
    path = Path(target).expanduser()
    if not is_gguf(path) and not path.is_dir():
        path = fetch_files(target, "*.json", "*.jinja")
    chat = chat_format(path, ())
    if chat is None:
        raise CommandError(f"The target {target} has no chat template; leave out warm_prompts.")
    return _gguf_codec(path, chat) if is_gguf(path) else _folder_codec(path, chat)


def _gguf_codec(path: Path, chat: ChatFormat) -> _Codec:
    encode, metadata = GgufTokenizer(path).encode, read_header(path).metadata
    strings: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    control = [
        string
        for string, kind in zip(strings, kinds, strict=False)
        if string
        and (
            kind in (TokenType.CONTROL, TokenType.UNKNOWN)
            or (kind == TokenType.USER_DEFINED and string in chat.template and any(map(str.isalnum, string)))
        )
    ]
    return _Codec(chat, control, encode)


def _folder_codec(folder: Path, chat: ChatFormat) -> _Codec:
    from tokenizers import Tokenizer  # an edge with GGUFs may do without it

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    control = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return _Codec(chat, control, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
