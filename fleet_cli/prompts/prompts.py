"""Prompts by category: the built-in ones, and those of a file."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from fleet_cli.demo.prompts import read_prompts
from fleet_cli.errors import CommandError

CATEGORIES: Final = ("summary", "question", "code", "translation", "chat", "report")

_FILE: Final = "prompts.toml"
_UNSORTED: Final = "all"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user's message.

    Attributes:
        category: What kind of text it asks for.
        text: The message.
    """

    category: str
    text: str


def built_in() -> tuple[Prompt, ...]:
    """Return the prompts that come with this package: ten of each of `CATEGORIES`."""
    return _prompts(tomllib.loads(files(__package__).joinpath(_FILE).read_text(encoding="utf-8")))


def some(prompts: tuple[Prompt, ...], each: int) -> tuple[Prompt, ...]:
    """Return the first so many prompts of each category."""
    seen = dict.fromkeys((prompt.category for prompt in prompts), 0)
    chosen = []
    for prompt in prompts:
        if seen[prompt.category] < each:
            chosen.append(prompt)
        seen[prompt.category] += 1
    return tuple(chosen)


def read_prompts_by_category(path: Path) -> tuple[Prompt, ...]:
    """Return the prompts of a file: one a line, or of a `.toml` file a list of texts under the name of each category.

    Raises:
        CommandError: The file cannot be read, or has no prompt in it.
    """
    if path.suffix.lower() != ".toml":
        return tuple(Prompt(_UNSORTED, text) for text in read_prompts(path))
    try:
        prompts = _prompts(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CommandError(f"--prompts {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError) as error:
        raise CommandError(
            f'--prompts {path} cannot be read: it has a list of texts for each category, such as chat = ["Hello."].'
        ) from error
    if not prompts:
        raise CommandError(f"--prompts {path} holds no prompt; write a list of them under a category's name.")
    return prompts


def _prompts(content: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """Read a file's content.

    Raises:
        TypeError: A category is not a list of texts.
    """
    found = []
    for category, texts in content.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError(category)
        found += [Prompt(category, text.strip()) for text in texts if text.strip()]
    return tuple(found)
