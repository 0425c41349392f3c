"""Commands that install an extra of this package: no package index has it."""

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

_CHECKOUT = Path(__file__).resolve().parents[1]


def install_command(extra: str, *, checkout: Path = _CHECKOUT) -> str:
    """Return the command that installs an extra from where this package came from.

    That is the checkout that runs, or the folder or wheel that pip has recorded. Without either it is for a checkout's
    folder.
    """
    source = str(checkout) if (checkout / "pyproject.toml").is_file() else _recorded() or "."
    return f"{shlex.quote(sys.executable)} -m pip install {shlex.quote(f'{source}[{extra}]')}"


def _recorded() -> str | None:
    """Return the folder or wheel that this package was installed from, if it is still there."""
    try:
        url = urlsplit(json.loads(distribution("dssd-fleet").read_text("direct_url.json") or "{}").get("url", ""))
    except (PackageNotFoundError, ValueError):
        return None
    path = unquote(url.path)
    return path if url.scheme == "file" and Path(path).exists() else None
