"""Grammar of `fleet device generate`: from a file or a flag."""

import json
from pathlib import Path

from pydantic import ValidationError

from fleet_cli.errors import CommandError
from schemas.policy import MAX_GRAMMAR_BYTES, Grammar


def read_grammar(*, json_schema: Path | None, regex: str | None, lark: Path | None) -> Grammar | None:
    """Return the grammar that the flags ask for, if they do.

    Raises:
        CommandError: There is more than one, or a file cannot be read or is too large.
    """
    given = [name for name, value in (("json-schema", json_schema), ("regex", regex), ("lark", lark)) if value]
    if len(given) > 1:
        raise CommandError(f"--{given[0]} and --{given[1]} go not together; give one of them.")
    try:
        if json_schema is not None:
            return Grammar.json_schema(json.loads(_read(json_schema)))
        if lark is not None:
            return Grammar.lark(_read(lark))
        return Grammar.regex(regex) if regex else None
    except json.JSONDecodeError as error:
        raise CommandError(f"{json_schema} is not JSON: {error}.") from None
    except (ValidationError, RecursionError):
        raise CommandError(f"The grammar has more than {MAX_GRAMMAR_BYTES} bytes, or cannot be read.") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not UTF-8"
        raise CommandError(f"The file {path} cannot be read: {reason}.") from None
