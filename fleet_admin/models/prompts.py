"""Prompts by category, built in or from a file."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from fleet_admin.models.facts import ModelsError

PROMPTS: Final = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Give five tips for keeping a small vegetable garden healthy.",
    "Describe how a bicycle stays upright.",
    "Write a polite email that asks a neighbour to turn the music down.",
    "What should one know before adopting a dog?",
    "Explain what a database index is to someone who has never programmed.",
    "Write a short poem about the first snow of the year.",
)


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """Read one prompt per line, by default the built-in ones; raises `ModelsError` if there is none."""
    if path is None:
        return PROMPTS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ModelsError(f"--prompts {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ModelsError(f"--prompts {path} is not a text in UTF-8; write one prompt a line.") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ModelsError(f"--prompts {path} holds no prompt; write one a line.")
    return prompts


_FILE: Final = "prompts.toml"
_UNSORTED: Final = "all"


@dataclass(frozen=True, slots=True)
class Prompt:
    category: str
    text: str


def built_in() -> tuple[Prompt, ...]:
    """Return the built-in prompts: ten of each of six categories."""
    return _prompts(tomllib.loads(files(__package__).joinpath(_FILE).read_text(encoding="utf-8")))


def some(prompts: tuple[Prompt, ...], each: int) -> tuple[Prompt, ...]:
    seen = dict.fromkeys((prompt.category for prompt in prompts), 0)
    chosen = []
    for prompt in prompts:
        if seen[prompt.category] < each:
            chosen.append(prompt)
        seen[prompt.category] += 1
    return tuple(chosen)


def read_prompts_by_category(path: Path) -> tuple[Prompt, ...]:
    """Read prompts: one per line, or in a `.toml` file a list for each category; raises `ModelsError`."""
    if path.suffix.lower() != ".toml":
        return tuple(Prompt(_UNSORTED, text) for text in read_prompts(path))
    try:
        prompts = _prompts(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ModelsError(f"--prompts {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ModelsError(
            f'--prompts {path} cannot be read: it has a list of texts for each category, such as chat = ["Hello."].'
        ) from error
    if not prompts:
        raise ModelsError(f"--prompts {path} holds no prompt; write a list of them under a category's name.")
    return prompts


def _prompts(content: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """Parse a file's content; raises TypeError if a category is not a list of strings."""
    found = []
    for category, texts in content.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError(category)
        found += [Prompt(category, text.strip()) for text in texts if text.strip()]
    return tuple(found)
