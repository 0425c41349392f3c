"""What the edge itself has for a remote target: address, key and tokenizer. Needs neither httpx nor the weights.

The servers have the weights. The setting `target` names the tokenizer and the end tokens: a folder with
`tokenizer.json`, or a GGUF.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from fleet_edge.verifiers.contract import UnsupportedModel, VerifierError
from fleet_edge.verifiers.source import check_gguf, target_name
from schemas.vocabulary import token_strings

_ENDPOINT: Final = "remote.endpoint"


class BadSetting(VerifierError):  # noqa: N818 - reads as what it says
    def __init__(self, sentence: str, *, setting: str) -> None:
        super().__init__(sentence)
        self.setting = setting


def endpoint_url(text: str) -> str:
    """Return the address in a setting; raises `VerifierError` if there is none, or it is invalid."""
    url = text.strip().rstrip("/").removesuffix("/v1")
    if not url:
        raise BadSetting(
            "The engine `remote` needs the address of an inference server; set 'remote.endpoint', for example to "
            "http://10.0.0.5:8000.",
            setting=_ENDPOINT,
        )
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or parts.query or parts.fragment or "," in url:
        raise BadSetting(
            f"{url!r} is not an address of an inference server; write it as http://10.0.0.5:8000 or https://NAME. For "
            "several servers, give the address of a router or load balancer.",
            setting=_ENDPOINT,
        )
    if parts.username or parts.password:
        raise BadSetting(
            "The address in 'remote.endpoint' holds a name or password; put the key into a file and set "
            "'remote.api_key_file'.",
            setting=_ENDPOINT,
        )
    return url


_MAX_BYTES: Final = 4096


def key_headers(path: Path | None) -> dict[str, str]:
    """Return the headers with the API key in a file, if any.

    Raises `VerifierError` if the file is unreadable, readable by others, or empty.
    """
    if path is None:
        return {}
    path = path.expanduser()
    try:
        mode = path.stat().st_mode
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise _bad_key(f"The key file {path} cannot be read ({error.strerror}); check its path.") from error
    if mode & 0o077:
        raise _bad_key(f"Other users may read the key file {path}; restrict it (chmod 600).")
    key = raw.decode("ascii", "replace").strip()
    if not key or len(raw) > _MAX_BYTES or not all("!" <= each <= "~" for each in key):
        raise _bad_key(f"The key file {path} holds no key: one line of printable characters is expected.")
    return {"Authorization": f"Bearer {key}"}


def _bad_key(sentence: str) -> BadSetting:
    return BadSetting(sentence, setting="remote.api_key_file")


_CONFIGS: Final = ("generation_config.json", "config.json")
_SAMPLES: Final = 24
_SAMPLE_SEED: Final = 20_507


@dataclass(frozen=True, slots=True)
class LocalTokens:
    """Facts of the target that need no weights: name, token strings by id without padding, end tokens."""

    name: str
    strings: list[str]
    end_tokens: tuple[int, ...]


def check_local(source: str) -> None:
    """Check that the files are there; raises `VerifierError`."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise UnsupportedModel(
                f"The folder {path} has no tokenizer.json; copy the tokenizer of the served model there."
            )
    elif path.is_file():
        check_gguf(path)
    else:
        raise VerifierError(
            f"There is no folder or file {path}; the engine `remote` needs the tokenizer of the served model: "
            "a folder with its tokenizer.json and config.json, or a GGUF."
        )


def load_local(source: str) -> LocalTokens:
    """Read token strings and end tokens; raises `VerifierError`."""
    check_local(source)
    from fleet_edge.verifiers.tokens import gguf_tokens, repository_tokens  # noqa: PLC0415 - reads GGUFs

    path = Path(source).expanduser().resolve()
    if path.is_dir():
        return LocalTokens(target_name(path), token_strings(repository_tokens(str(path))), _folder_ends(path))
    return LocalTokens(path.name, token_strings(gguf_tokens(path, vocabulary_only=True)), _gguf_ends(path))


def sample_tokens(strings: Sequence[str], end_tokens: Sequence[int]) -> list[int]:
    """Return a fixed choice of ids whose strings can be compared with a server's, and the end tokens."""
    order = random.Random(_SAMPLE_SEED).sample(range(len(strings)), len(strings))  # noqa: S311 - no secret
    plain = (token for token in order if any(_is_plain(each) for each in readings(strings[token])))
    chosen = [token for token, _ in zip(plain, range(_SAMPLES), strict=False)]
    return [*chosen, *(token for token in end_tokens if token not in chosen and token < len(strings))]


def readings(string: str) -> set[str]:
    """Return the strings that a stored token may stand for, by the conventions of the tokenizer families."""
    spaced = string.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    found = {string, spaced, spaced.lstrip(" ")}
    from fleet_edge.verifiers.tokens import byte_letters  # noqa: PLC0415 - see `load_local`

    letters = byte_letters()
    if all(each in letters for each in string):
        found.add(bytes(letters[each] for each in string).decode("utf-8", "replace"))
    return found


def _is_plain(text: str) -> bool:
    return text.isascii() and any(each.isalnum() for each in text)


def _folder_ends(path: Path) -> tuple[int, ...]:
    for name in _CONFIGS:
        try:
            config = json.loads((path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UnsupportedModel(f"The file {path / name} is damaged; copy it again.") from error
        ends = config.get("eos_token_id") if isinstance(config, dict) else None
        if ends is not None:
            return _ids(ends, path / name)
    raise UnsupportedModel(
        f"The folder {path} does not name the end tokens; copy the served model's config.json there."
    )


def _gguf_ends(path: Path) -> tuple[int, ...]:
    from fleet_common.gguf_files import GgufUnreadable, read_header  # noqa: PLC0415 - only where there is a GGUF

    try:
        ends = read_header(path).end_tokens
    except GgufUnreadable as error:
        raise UnsupportedModel(str(error)) from error
    if not ends:
        raise UnsupportedModel(f"The GGUF {path} does not name an end token; choose another file.")
    return ends


def _ids(ends: object, path: Path) -> tuple[int, ...]:
    listed = ends if isinstance(ends, list) else [ends]
    if not all(type(end) is int and end >= 0 for end in listed):
        raise UnsupportedModel(f"The end tokens in {path} are no token ids; copy the file again.")
    return tuple(sorted(set(listed)))
