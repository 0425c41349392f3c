import hashlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = (ROOT / "fleet_admin/dashboard/static/vendor", Path(__file__).parent / "vendor")


@pytest.mark.parametrize("folder", FOLDERS, ids=["dashboard", "tests"])
def test_what_is_of_others_is_unchanged_and_has_its_licence(folder: Path) -> None:
    readme = (folder / "README.md").read_text(encoding="utf-8")
    files = [each for each in folder.iterdir() if each.suffix in {".js", ".css"}]
    assert files
    for each in files:
        assert hashlib.sha256(each.read_bytes()).hexdigest() in readme, each.name
        assert each.name in readme
    for name in re.findall(r"`([\w.]+LICENSE)`", readme):
        assert (folder / name).stat().st_size > 500
