"""`fleet admin` as tests run it."""

import json
from collections.abc import Callable
from typing import Any

Run = Callable[..., tuple[int, str, str]]
"""Takes arguments and standard input; returns exit code, standard output and standard error."""


def as_json(outcome: tuple[int, str, str], code: int = 0) -> Any:
    """Return what was printed; it must have ended with that code."""
    found, output, complaint = outcome
    assert found == code, complaint
    return json.loads(output)
