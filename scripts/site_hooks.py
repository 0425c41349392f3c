"""Hooks of mkdocs: the site also has the files outside docs/ that its pages link to.

README.md would be the front page of the site, so it becomes overview.md. A link to a folder becomes plain text, since a
site has no listings.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mkdocs.structure.files import File, Files

ROOT: Final = Path(__file__).resolve().parent.parent
_LINK: Final = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")

_sources: dict[str, str] = {}
"""Path in the repository, by path in the site, of pages outside docs/."""


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages link to, and what these link to."""
    known = {f"docs/{each.src_uri}" for each in files}
    unread = sorted(path for path in known if path.endswith(".md"))
    while unread:
        for path in _linked(unread.pop()):
            if path in known or not (ROOT / path).is_file():
                continue
            known.add(path)
            _sources[_in_site(path)] = path
            files.append(File.generated(config, _in_site(path), abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                unread.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Point links at the places that the files have in the site."""
    uri = page.file.src_uri
    source = _sources.get(uri, f"docs/{uri}")

    def moved(link: re.Match[str]) -> str:
        path = _target(source, link[3])
        if (ROOT / path).is_dir():
            return link[2]
        place = posixpath.relpath(_in_site(path), posixpath.dirname(uri) or ".")
        return f"{link[1]}[{link[2]}]({place}{link[4] or ''})"

    return _LINK.sub(moved, markdown)


def _linked(source: str) -> Iterator[str]:
    for link in _LINK.finditer((ROOT / source).read_text(encoding="utf-8")):
        yield _target(source, link[3])


def _target(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _in_site(path: str) -> str:
    return "overview.md" if path == "README.md" else path.removeprefix("docs/")
