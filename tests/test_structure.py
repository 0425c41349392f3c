import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("script", ["settings-page", "events-page"])
def test_the_generated_page_is_current(script: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["docs/structure.md", "docs/extending.md", "CONTRIBUTING.md"])
def test_each_path_on_a_page_for_contributors_exists(page: str) -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    names = re.findall(r"`((?:\w+/)+(?:[\w-]+(?:\.\w+)?)?)`", (ROOT / page).read_text())
    paths = [name for name in names if name.split("/")[0] in folders]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
