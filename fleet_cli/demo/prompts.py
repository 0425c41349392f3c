"""Prompts of the demo's devices."""

from pathlib import Path
from typing import Final

from fleet_cli.errors import CommandError

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
    """Return the prompts of a file, one a line, or the built-in ones.

    Raises:
        CommandError: The file cannot be read, or has no prompt in it.
    """
    if path is None:
        return PROMPTS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CommandError(f"--prompts {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"--prompts {path} is not a text in UTF-8; write one prompt a line.") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise CommandError(f"--prompts {path} holds no prompt; write one a line.")
    return prompts
