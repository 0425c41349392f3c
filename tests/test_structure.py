import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_generated_pages_are_current() -> None:
    command = [sys.executable, ROOT / "scripts" / "pages.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_settings_are_few_enough_to_be_read() -> None:
    """A new setting replaces one, or is a good constant instead."""
    page = (ROOT / "docs/settings.md").read_text()
    lists = re.findall(r"--help` explains (.*)\.$", page, flags=re.MULTILINE)
    explained = [name for line in lists for name in line.split(", ")]
    assert len(explained) + len(re.findall(r"^\| `", page, flags=re.MULTILINE)) <= 120


@pytest.mark.parametrize("page", ["docs/structure.md", "docs/extending.md", "CONTRIBUTING.md"])
def test_each_path_on_a_page_for_contributors_exists(page: str) -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    names = re.findall(r"`((?:\w+/)+(?:[\w-]+(?:\.\w+)?)?)`", (ROOT / page).read_text())
    paths = [name for name in names if name.split("/")[0] in folders]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
