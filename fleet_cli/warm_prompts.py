"""Prompts that an edge computes ahead: from a file of system prompts to the tokens that devices will send."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from gguf import TokenType

from fleet_cli.errors import CommandError
from fleet_common.gguf_files import read_header
from fleet_common.grammar.errors import GrammarUnavailable
from fleet_device.drafters.contract import DrafterError
from fleet_device.requests.chat import chat_prompt
from fleet_device.requests.structured import ChatMessage
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.source import fetch_files, is_gguf
from fleet_edge.verifiers.tokens import GgufTokenizer

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
    if codec.chat_template is None:
        raise CommandError(f"The target {settings.target} has no chat template; leave out warm_prompts.")
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

    def __init__(
        self, template: str | None, control: Sequence[str], special: dict[str, str], encode: Callable[[str], list[int]]
    ) -> None:
        self.chat_template = template
        self.control_texts = tuple(sorted(control))
        self._special = special
        self._encode = encode

    def special_text(self, name: str) -> str:
        return self._special.get(name, "")

    def encode(self, text: str, *, special: bool = False) -> list[int]:  # noqa: ARG002 - templates are rendered
        return self._encode(text) if text else []

    def piece(self, token: int) -> bytes:  # noqa: ARG002 - of thinking, which does not matter here
        return b""


def _codec(target: str) -> _Codec:
    path = Path(target).expanduser()
    if is_gguf(path):
        return _gguf_codec(path)
    return _folder_codec(path if path.is_dir() else fetch_files(target, "*.json", "*.jinja"))


def _gguf_codec(path: Path) -> _Codec:
    encode, metadata = GgufTokenizer(path).encode, read_header(path).metadata
    strings: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    template = metadata.get("tokenizer.chat_template")
    control = [
        string
        for string, kind in zip(strings, kinds, strict=False)
        if string
        and (
            kind in (TokenType.CONTROL, TokenType.UNKNOWN)
            or (kind == TokenType.USER_DEFINED and string in (template or "") and any(map(str.isalnum, string)))
        )
    ]
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    special = {name: strings[token] for name, token in ids.items() if token is not None}
    return _Codec(template, control, special, encode)


def _folder_codec(folder: Path) -> _Codec:
    from tokenizers import Tokenizer  # an edge with GGUFs may do without it

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    apart = folder / "chat_template.jinja"
    template = apart.read_text(encoding="utf-8") if apart.exists() else config.get("chat_template")
    control = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    texts = {name: config.get(f"{name}_token") for name in ("bos", "eos")}
    special = {name: each["content"] if isinstance(each, dict) else each for name, each in texts.items() if each}
    return _Codec(template, control, special, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
