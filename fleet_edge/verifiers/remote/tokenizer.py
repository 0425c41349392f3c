"""Local tokenizer files of the remote target: the vocabulary that devices are held to, and how its tokens read.

The weights are at the servers. Here lie the tokenizer and the end tokens: a folder with `tokenizer.json`, a GGUF, or a
repository's cached files.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fleet_edge.verifiers.contract import UnsupportedModel, VerifierError
from schemas.vocabulary import token_strings

_CONFIGS: Final = ("generation_config.json", "config.json")
_END_KEYS: Final = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
_GGUF_MAGIC: Final = b"GGUF"
_SAMPLES: Final = 24
_SAMPLE_SEED: Final = 20_507


@dataclass(frozen=True, slots=True)
class LocalTokens:
    """What is known of the target without its weights.

    Attributes:
        name: For the log.
        strings: By id, padding left out.
        end_tokens: Ids that end a text.
    """

    name: str
    strings: list[str]
    end_tokens: tuple[int, ...]


def check_local(source: str) -> None:
    """Check that the files are there, as far as a glance tells.

    Raises:
        VerifierError: They are not.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise UnsupportedModel(
                f"The folder {path} has no tokenizer.json; copy the tokenizer of the served model there."
            )
    elif path.is_file():
        with path.open("rb") as file:
            if file.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
                raise UnsupportedModel(f"The file {path} is no GGUF; give one, or a folder with a tokenizer.json.")
    else:
        raise VerifierError(
            f"There is no folder or file {path}; the engine `remote` needs the tokenizer of the served model: "
            "a folder with its tokenizer.json and config.json, or a GGUF."
        )


def load_local(source: str) -> LocalTokens:
    """Read tokens and end tokens.

    Raises:
        VerifierError: They cannot be read.
    """
    check_local(source)
    from fleet_edge.verifiers.packed.tokens import gguf_tokens, repository_tokens  # noqa: PLC0415 - reads GGUFs

    path = Path(source).expanduser().resolve()
    if path.is_dir():
        strings = token_strings(repository_tokens(str(path)))
        return LocalTokens(path.parent.name if path.name == "target" else path.name, strings, _folder_ends(path))
    return LocalTokens(path.name, token_strings(gguf_tokens(path, vocabulary_only=True)), _gguf_ends(path))


def sample_tokens(strings: Sequence[str], end_tokens: Sequence[int]) -> list[int]:
    """Return some ids whose text can be compared with a server's: always the same ones, and the end tokens."""
    order = random.Random(_SAMPLE_SEED).sample(range(len(strings)), len(strings))  # noqa: S311 - no secret
    plain = (token for token in order if any(_is_plain(each) for each in readings(strings[token])))
    chosen = [token for token, _ in zip(plain, range(_SAMPLES), strict=False)]
    return [*chosen, *(token for token in end_tokens if token not in chosen and token < len(strings))]


def readings(string: str) -> set[str]:
    """Return the texts that a token's stored string may stand for, by the conventions of the tokenizer families."""
    spaced = string.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    found = {string, spaced, spaced.lstrip(" ")}
    if all(each in _BYTES for each in string):
        found.add(bytes(_BYTES[each] for each in string).decode("utf-8", "replace"))
    return found


def _is_plain(text: str) -> bool:
    return text.isascii() and any(each.isalnum() for each in text)


def _byte_alphabet() -> dict[str, int]:
    """Return what byte-level BPE writes each byte as: itself if that can be printed, else a letter from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES: Final = _byte_alphabet()


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
        f"The folder {path} does not say which tokens end a text; copy the served model's config.json there."
    )


def _gguf_ends(path: Path) -> tuple[int, ...]:
    from gguf import GGUFReader  # noqa: PLC0415 - only where there is a GGUF to read

    reader = GGUFReader(path)
    found: list[Any] = [field.contents() for key in _END_KEYS if (field := reader.get_field(key)) is not None]
    if not found:
        raise UnsupportedModel(f"The GGUF {path} does not say which token ends a text; choose another file.")
    return _ids(found, path)


def _ids(ends: object, path: Path) -> tuple[int, ...]:
    listed = ends if isinstance(ends, list) else [ends]
    if not all(type(end) is int and end >= 0 for end in listed):
        raise UnsupportedModel(f"The end tokens in {path} are no token ids; copy the file again.")
    return tuple(sorted(set(listed)))
