import ast
import json
import re
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
DOCS: Final = sorted((ROOT / "docs").glob("*.md"))
PAGES: Final = [*DOCS, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *ROOT.glob("*/README.md")]
READERS: Final[dict[str, Callable[[str], object]]] = {
    "json": json.loads,
    "python": ast.parse,
    "toml": tomllib.loads,
}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_each_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for path, anchor in re.findall(r"\]\(([^)\s#:]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@each_page
def test_each_snippet_can_be_read(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for language, snippet in re.findall(r"^ *```(\w+)\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL):
        if reader := READERS.get(language):
            reader(textwrap.dedent(snippet))


@each_page
def test_each_row_of_a_table_belongs_to_one(page: Path) -> None:
    """An empty line inside a table ends it, and a row with too few or too many cells is cut or filled."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
        assert re.match(r".*\n\|(?: *:?-+:? *\|)+$", table, flags=re.MULTILINE), table
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_the_index_links_every_page() -> None:
    linked = set(re.findall(r"\]\((\w[\w-]*\.md)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert linked == {page.name for page in DOCS} - {"index.md"}
